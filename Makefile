# Targets with a ## comment are the help that `make` prints.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.NOTPARALLEL:

# Go's usual place, and the tools of the administrator, need not be in the caller's PATH.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
# A clone that belongs to another user (sudo make) must not stop go build from asking git for the version.
export GIT_CONFIG_COUNT := 1
export GIT_CONFIG_KEY_0 := safe.directory
export GIT_CONFIG_VALUE_0 := $(CURDIR)

GO ?= go
# The same sources give the same bytes in every folder: no paths, no build id, and the version from scripts/version.sh.
BUILDFLAGS := -trimpath -buildvcs=false
VERSION = $(shell scripts/version.sh)
REVISION = $(shell git rev-parse HEAD 2>/dev/null)
LDFLAGS = $(STRIP) -buildid= -X main.release=$(VERSION) -X main.revision=$(REVISION)
PREFIX ?= /usr/local
DESTDIR ?=
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
# How long each fuzz target runs.
FUZZTIME ?= 20s
# How long each benchmark runs, and which.
BENCHTIME ?= 1s
BENCH ?= .
# How many times each case beside a native client is measured. A round takes 8 minutes on two cores.
ROUNDS ?= 3
# Two packages at a time: most tests of namespaces wait for timers and for the kernel more than they compute.
TESTFLAGS ?= -p 2 -count=1

.PHONY: help
help: ## Print this help
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: build
build: ## Build bin/viasocks
	CGO_ENABLED=0 $(GO) build $(BUILDFLAGS) -ldflags '$(LDFLAGS)' -o bin/viasocks ./cmd/viasocks

.PHONY: test
test: deps lint unit race aria formats ## Everything CI runs: installs what it needs (root), lint, unit, race, namespace, aria2 and package tests
	@echo "make test: passed"

.PHONY: check
check: vet ## Quick check: gofmt, go vet and the short tests, no root: two to three minutes on two cores
	$(GO) test -short ./...

.PHONY: deps
deps:
	scripts/deps.sh test demo formats

.PHONY: vet
vet:
	@files=$$(gofmt -l .); if [[ -n $$files ]]; then echo "gofmt -l:"; echo "$$files"; exit 1; fi
	$(GO) vet ./...

.PHONY: lint
lint: vet
	for f in scripts/*.sh packaging/*.sh packaging/scripts/*.sh .ci/run; do bash -n "$$f"; done
	$(GO) run $(STATICCHECK) ./...

# With root, and where user namespaces are allowed, the namespace and end-to-end tests run as part of these. The package that
# takes longest comes first, so that it does not run alone at the end.
.PHONY: unit
unit: build
	GO=$(GO) scripts/gotest.sh $(TESTFLAGS) -timeout 40m -- ./cmd/internal/hosttest ./...

# hosttest and servicetest watch a host from outside while viasocks is killed and restarted. e2e tests what the daemon does
# inside, and is built with the race detector here. route/kernel has one goroutine of its own, the watch over the host.
.PHONY: race
race: ## Run the tests under the race detector
	GO=$(GO) scripts/gotest.sh $(TESTFLAGS) -race -timeout 40m -- ./cmd/internal/e2e $$($(GO) list ./... | grep -v -e /cmd/internal/hosttest -e /cmd/internal/servicetest -e /route/kernel)
	GO=$(GO) scripts/gotest.sh $(TESTFLAGS) -race -run 'Watch|PutBack|Source|Guard|MadeAnew' -- ./route/kernel

# aria runs the demo as a test, with smaller files.
.PHONY: aria
aria: build
	@if [[ $$EUID -eq 0 ]]; then DEMO_SCALE=10 DEMO_PATIENCE=4 scripts/demo.sh; else echo "aria: skipped: the demo's namespaces need root"; fi

# formats tests the packages that are not Debian's, and that two builds are identical, in half a minute. The tests of the
# Debian package and of the image (packages-test, image-test) take two minutes more. servicetest, which is part of unit, already
# tests crashes and upgrades under systemd's units.
.PHONY: formats
formats:
	@if [[ $$EUID -eq 0 ]]; then packaging/formats-test.sh; else echo "formats: skipped: installing packages needs root"; fi

# Without a limit, minimizing takes most of the time, because the code that a frame covers depends on the frames before it.
.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME (20s)
	@grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' . | sort | while read -r file; do \
		for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$file"); do \
			echo "fuzz: $$(dirname "$$file") $$name for $(FUZZTIME)"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$(dirname "$$file")" </dev/null; \
		done; \
	done

.PHONY: bench
bench: ## Benchmarks, the speed beside a native client, and names (root): half an hour, with ROUNDS=1 twelve minutes
	scripts/deps.sh bench
	$(GO) test -p 1 -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -benchmem ./...
	@if [[ -x scripts/bench.sh ]]; then scripts/bench.sh --rounds $(ROUNDS); fi
	scripts/dnsbench.sh --rounds $(ROUNDS)
	scripts/dnsbench.sh --rounds $(ROUNDS) --delay 5ms
	scripts/dnsbench.sh --rounds $(ROUNDS) --names 100000 --connections

.PHONY: lab
lab: build ## Three namespaces to try things in (root); then: scripts/lab.sh shell app
	scripts/lab.sh up

.PHONY: demo
demo: ## Six downloads of aria2 through a SOCKS proxy, on real programs (root)
	scripts/deps.sh demo
	@$(MAKE) build
	scripts/demo.sh

# The client of Kubernetes' engines, which Debian 12 does not have. Without it, TestEngines skips Kubernetes.
CRICTL := sigs.k8s.io/cri-tools/cmd/crictl@v1.34.0

.PHONY: zoo
zoo: ## Ask real SOCKS servers what they do, for the manual; then failing servers, Tor, Chromium and container engines behind viasocks (root)
	scripts/deps.sh zoo
	$(GO) test $(TESTFLAGS) -v -run TestRuntimes ./cmd/internal/e2e
	GOBIN=$(CURDIR)/bin/zoo CGO_ENABLED=0 $(GO) install $(CRICTL) || echo "zoo: crictl cannot be built: Kubernetes is skipped"
	PATH=$(CURDIR)/bin/zoo:$$PATH $(GO) test $(TESTFLAGS) -v -run TestEngines ./cmd/internal/hosttest
	$(GO) test $(TESTFLAGS) -v -run TestMachined ./cmd/internal/servicetest
	scripts/zoo.sh

.PHONY: slow
slow: ## Tests that take minutes: 300 echoes in 60 s beside datagrams that end their association, and clients of DHCPv6 (root)
	VIASOCKS_SLOW=1 $(GO) test $(TESTFLAGS) -v -timeout 10m -run TestUDPPoison ./route
	VIASOCKS_SLOW=1 $(GO) test $(TESTFLAGS) -v -timeout 10m -run TestClients6 ./cmd/internal/hosttest

UNITS := viasocks.service viasocks@.service viasocks-closed.service
UNITDIR := $(PREFIX)/lib/systemd/system
MANUAL := viasocks.1 viasocks.conf.5 viasocks.7

.PHONY: install
install: build ## Install under PREFIX (/usr/local), below DESTDIR: the program, its manual, completions for shells, units for systemd
	install -D -m 755 bin/viasocks $(DESTDIR)$(PREFIX)/bin/viasocks
	for m in $(MANUAL); do \
		install -D -m 644 "cmd/viasocks/$$m" "$(DESTDIR)$(PREFIX)/share/man/man$${m##*.}/$$m"; \
	done
	for c in bash:bash-completion/completions/viasocks zsh:zsh/site-functions/_viasocks fish:fish/vendor_completions.d/viasocks.fish; do \
		install -d -m 755 "$$(dirname "$(DESTDIR)$(PREFIX)/share/$${c#*:}")"; \
		bin/viasocks completion "$${c%%:*}" >"$(DESTDIR)$(PREFIX)/share/$${c#*:}"; chmod 644 "$(DESTDIR)$(PREFIX)/share/$${c#*:}"; \
	done
	install -d -m 755 $(DESTDIR)$(UNITDIR)
	for u in $(UNITS); do \
		sed 's|/usr/local/bin/|$(PREFIX)/bin/|' "scripts/$$u" >"$(DESTDIR)$(UNITDIR)/$$u"; chmod 644 "$(DESTDIR)$(UNITDIR)/$$u"; \
	done

.PHONY: uninstall
uninstall: ## Remove what install put there
	rm -f $(DESTDIR)$(PREFIX)/bin/viasocks $(foreach m,$(MANUAL),$(DESTDIR)$(PREFIX)/share/man/man$(patsubst .%,%,$(suffix $(m)))/$(m)) $(UNITS:%=$(DESTDIR)$(UNITDIR)/%) \
		$(addprefix $(DESTDIR)$(PREFIX)/share/,bash-completion/completions/viasocks zsh/site-functions/_viasocks \
		fish/vendor_completions.d/viasocks.fish)

.PHONY: packages
packages: ## Packages for Debian, Fedora, Alpine and Arch in dist/
	packaging/build.sh dist

.PHONY: packages-test
packages-test: ## Install, use, upgrade and remove the packages; two builds are identical (root)
	scripts/deps.sh test formats packages
	packaging/test.sh
	packaging/formats-test.sh

.PHONY: image
image: ## A container image from scratch in dist/, made without an engine
	packaging/image.sh

.PHONY: image-test
image-test: ## Run the image as a sidecar by crun, and kill, stop and start it (root)
	scripts/deps.sh test packages
	packaging/image-test.sh

.PHONY: clean
clean: ## Remove what build and packages made
	rm -rf bin dist
