run() { docker run --runtime "$RUNTIME" "$@"; }
# Quietly, the name of what runs in the background does not matter.
begin() { run -d "$@" >/dev/null; }
# Until it is so, for half a minute.
soon() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 150 ] || { echo "never: $*"; exit 1; }
        sleep 0.2
    done
}
says() { docker logs "$1" 2>&1 | grep -q "$2"; }
state() { docker inspect -f "{{.State.$2}}" "$1"; }
is() { [ "$(state "$1" "$2")" = "$3" ]; }
# A page, as a browser gets it.
get() { python3 -c 'import sys, urllib.request as web; print(web.urlopen(sys.argv[1], timeout=10).read().decode(), end="")' "$1"; }
# Sends a datagram to a port of 127.0.0.1, until the same comes back.
datagram() {
    python3 -c '
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(2)
for _ in range(20):
    try:
        s.sendto(b"there and back", ("127.0.0.1", int(sys.argv[1])))
        print(s.recv(99).decode())
        sys.exit()
    except OSError:
        pass
sys.exit("nothing came back")
' "$1"
}
# As on a terminal.
terminal() {
    python3 -c 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))' "$@"
}
