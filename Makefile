# SPDX-License-Identifier: Apache-2.0

.DEFAULT_GOAL := help
.PHONY: help build demo demo-pods test test-vm test-pods test-programs soak bench lint fmt generate image deps clean

# sudo hides the usual place of Go.
export PATH := $(PATH):/usr/local/go/bin

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/pillion, one static binary
	@scripts/deps.sh build
	@scripts/build.sh

demo: ## watch it work: curl and nginx, a sidecar beside each, every address true (root)
	@scripts/demo.sh

demo-pods: ## the same in real pods, by podman: inject, play, talk (root)
	@scripts/demo-pods.sh

test: ## vet and all tests; those that need the kernel want root
	@scripts/test.sh

test-vm: ## what kernels decide, on 5.10, 6.1, 6.12 and the newest, in virtual machines (qemu)
	@scripts/vm.sh

test-pods: ## real pods on those kernels, in virtual machines (qemu, podman; root)
	@scripts/vm-pods.sh

test-programs: ## other people's programs by pillion run of a user without rights, on those kernels, in virtual machines (qemu)
	@scripts/vm-programs.sh

soak: ## ten minutes of everything at random, with checked invariants (root)
	@scripts/soak.sh

bench: ## Pillion's capture beside iptables REDIRECT and slirp4netns, its relay beside HAProxy and nginx: ratios, and bin/bench.png (root)
	@scripts/deps.sh bench
	@scripts/bench.sh -plot bin/bench.png

lint: ## golangci-lint and shellcheck
	@scripts/lint.sh

fmt: ## gofumpt over the tree
	@"$$(scripts/tool.sh gofumpt)" -w .

generate: ## bpf/: Go bindings and objects from the C (clang 14)
	@scripts/generate.sh

image: ## container image FROM scratch (podman, buildah or docker)
	@scripts/image.sh

deps: ## install the Debian packages that test, lint and generate need (root)
	@scripts/deps.sh build demo test bench lint generate

clean: ## remove what was built
	@rm -rf bin coverage*
