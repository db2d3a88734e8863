# Each target calls a script in hack/, which says more with --help or in its first lines.

.PHONY: help install deb run test test-unit test-e2e audit bench bench-boot bench-container bench-network fuzz soak setup build lint shell clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 17

run: setup ## run a container, and show whose kernel it sees
	@hack/run

test: setup ## every test (what CI runs)
	@hack/test

test-unit: setup ## format, lints, unit and doc tests
	@hack/test format lint unit docs

test-e2e: setup ## end-to-end tests: make test-e2e ARCH=aarch64 CONTAINERD=2.1 FILTER=word,word
	@hack/test e2e

audit: setup ## licences, bans, duplicates and advisories of the dependencies
	@hack/audit

bench: setup ## benchmarks side by side with their peers, as tables and charts in target/bench
	@hack/bench

bench-boot: setup ## only boot to init, compared with QEMU
	@hack/bench boot

bench-container: setup ## only the steps of a container's life, compared with runc and crun, and a restored machine with a booted one
	@hack/bench container

bench-network: setup ## only what a container's network carries, compared with runc and QEMU
	@hack/bench network

fuzz: setup ## what reads snapshots, fed with what a fuzzer makes up: hack/fuzz SECONDS
	@hack/fuzz

soak: setup ## the long counts, part by part, written to docs/soak.md
	@hack/soak

build: setup ## build the product for this machine
	@hack/build "$$(uname -m)"

install: setup ## build and install on this machine (DESTDIR=DIR: below there)
	@hack/install "$(DESTDIR)"

deb: setup ## a Debian package in target/deb
	@hack/deb

lint: setup ## format and lints only
	@hack/test format lint

shell: setup ## a shell in a test bed that stays up
	@hack/testbed status | grep -q "^$$(uname -m):" || hack/testbed up
	@hack/testbed shell

setup: ## install what is missing on this machine
	@hack/setup

clean: ## remove what was built (the test bed's cache: hack/testbed clean)
	rm -rf target
