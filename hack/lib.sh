# Shared by the scripts beside it: where the house is, and which compiler builds for what.

root=$(cd "$(dirname "$0")/.." && pwd)

# Of the programs that are built: `quick` is for the inner loop.
profile=${PROFILE:-release}

say() { echo ":: $*" >&2; }
die() { echo "$(basename "$0"): $*" >&2; exit 1; }

# The rustc that has a standard library for target $1: the user's own, or the distribution's.
rustc_for() {
    for candidate in rustc /usr/bin/rustc; do
        if command -v "$candidate" >/dev/null 2>&1; then
            lib=$("$candidate" --print target-libdir --target "$1" 2>/dev/null) || continue
            if ls "$lib"/libstd-*.rlib >/dev/null 2>&1; then
                echo "$candidate"
                return
            fi
        fi
    done
    die "no Rust compiler here has a standard library for $1: make setup installs one"
}

# cargo "$@" for a static Linux binary of architecture $1.
cargo_for() {
    arch=$1
    shift
    target=$arch-unknown-linux-gnu
    RUSTC=$(rustc_for "$target") || exit 1
    export RUSTC
    if [ "$arch" != "$(uname -m)" ]; then
        variable=$(echo "$target" | tr 'a-z-' 'A-Z_')
        export "CARGO_TARGET_${variable}_LINKER=$arch-linux-gnu-gcc"
    fi
    # The C libraries in the house (see ARCHITECTURE.md), linked in.
    export LIBCAPNG_LINK_TYPE=static "LIBCAPNG_LIB_PATH=/usr/lib/$arch-linux-gnu"
    export LIBSECCOMP_LINK_TYPE=static "LIBSECCOMP_LIB_PATH=/usr/lib/$arch-linux-gnu"
    subcommand=$1
    shift
    RUSTFLAGS="-C target-feature=+crt-static" cargo "$subcommand" --target "$target" "$@"
}

# Builds the product for architecture $1, and the further programs named, from the same set of packages whichever are
# named: so what they have in common is compiled once.
programs_for() {
    wanted=$1
    shift
    set -- testbed-init supermachine-vmm supermachine-agent containerd-shim-supermachine-v2 supermachine "$@"
    for program in "$@"; do
        set -- "$@" --bin "$program"
        shift
    done
    cargo_for "$wanted" build --quiet --profile "$profile" -p testbed -p vmm -p supermachine-agent -p shim -p integration "$@"
}

# Where cargo_for leaves the binaries of architecture $1.
target_dir() { echo "$root/target/$1-unknown-linux-gnu/$profile"; }
