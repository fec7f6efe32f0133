# Everything that is done to this repository, by name. `make` alone prints the list.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# One process more than CPUs, since tests wait a lot. Whole files go to one process, so that a server or broker of a module is started once,
# and in their order: pytest-xdist would leave the files with few tests, which are the slow ones, to the end.
PYTEST_WORKERS ?= $(shell expr $$(nproc) + 1)
XDIST := -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROJECT := llamacpp_mqtt_deploy tests docs custom_components $(wildcard training benchmarks distribution debian)

# Where a package manager asks nothing and starts nothing.
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120
CAN_APT = [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null

.PHONY: help install inprocess broker tools javascript browser screenshots top-picture test test-fast test-metrics prometheus mutants bench hostile hostile-http flood gateway-load brokers audit faults faults-pool database-crashes fleet soak check format demo config-example schema config docs build deb test-deb test-arm64 release clean-roots clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# --- set-up ----------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		if $(CAN_APT); then $(APT) update && $(APT) install --no-install-recommends -y python3-venv; \
		else echo "Python's venv module is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; fi; \
	fi
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/install: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --editable '.[dev]' -c constraints.txt
	@mkdir -p $(@D) && touch $@ $(@D)/demo # dev has all that demo has

# A first try does not wait for the development tools.
$(STAMPS)/demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the demo and what it needs into $(VENV) ..."
	$(PIP) install --quiet --editable '.[demo,gateway]' -c constraints.txt
	@mkdir -p $(@D) && touch $@

# Compiled from source (about four minutes on two cores), then kept in pip's wheel cache.
$(STAMPS)/inprocess: constraints.txt | $(STAMPS)/install
	@echo "Installing llama-cpp-python: the first time it is compiled, which takes some minutes."
	$(PIP) install --quiet --editable '.[inprocess]' -c constraints.txt
	@$(BIN)/python -c 'import llama_cpp'
	@mkdir -p $(@D) && touch $@

install: $(STAMPS)/install ## the package and its development tools in .venv

inprocess: $(STAMPS)/inprocess ## llama-cpp-python in .venv (compiled once)

# The package starts a broker on port 1883 when installed. Tests start their own, so policy-rc.d (Debian's switch for
# this) says no during the installation and the service is left disabled.
broker: ## the mosquitto program, from apt where it is missing
	@if ! PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v mosquitto >/dev/null; then \
		if $(CAN_APT); then \
			if [ ! -e /usr/sbin/policy-rc.d ]; then \
				trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
				printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
			fi; \
			$(APT) update && $(APT) install --no-install-recommends -y mosquitto mosquitto-clients; \
			if [ -d /run/systemd/system ]; then systemctl disable --quiet mosquitto.service; fi; \
		else \
			echo "The tests need the MQTT broker mosquitto. On Debian and Ubuntu: sudo apt-get install mosquitto" >&2; \
			echo "(then, if no broker shall run all the time: sudo systemctl disable --now mosquitto)" >&2; exit 1; \
		fi; \
	fi

# --- checks ----------------------------------------------------------------------------------------------------------

# What documentation and units are tried with: jq for one-liners, node for the web page and Node-RED, g++ for the ESP32 sketch,
# systemd-analyze for the sandboxes, nginx for the reverse proxy.
# PostgreSQL is installed without a cluster: the tests make their own.
# nginx comes with a service that starts when it is installed, unless policy-rc.d says no (see `broker`).
tools:
	@if [ ! -e /usr/sbin/policy-rc.d ] && $(CAN_APT); then \
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT; printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
	fi; \
	for tool in jq:jq node:nodejs g++:g++ systemd-analyze:systemd nginx:nginx-light; do \
		if ! PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v "$${tool%%:*}" >/dev/null; then \
			if $(CAN_APT); then $(APT) update && $(APT) install --no-install-recommends -y "$${tool#*:}"; \
			else echo "Without $${tool%%:*} some examples and units are not tried." >&2; fi; \
		fi; \
	done
	@if ! ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 && ! command -v postgres >/dev/null; then \
		if $(CAN_APT); then \
			if [ ! -e /usr/sbin/policy-rc.d ]; then \
				trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
				printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
			fi; \
			mkdir -p /etc/postgresql-common; \
			[ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf; \
			$(APT) update && $(APT) install --no-install-recommends -y postgresql; \
		else echo "Without PostgreSQL (apt-get install postgresql) the store of a fleet is not tried." >&2; fi; \
	fi

# MQTT.js for the tests of clients/js, terser for the file that is shipped, axe-core for the page.
tests/js/node_modules/.package-lock.json: tests/js/package-lock.json
	@if ! command -v npm >/dev/null && $(CAN_APT); then $(APT) update && $(APT) install --no-install-recommends -y nodejs npm; fi
	@if command -v npm >/dev/null; then npm ci --prefix tests/js --silent --no-fund --no-audit && touch $@; \
	else echo "Without npm the JavaScript client is not tried at a real broker." >&2; fi

node-packages: tests/js/node_modules/.package-lock.json
.PHONY: node-packages

javascript: node-packages ## clients/js/lmd.min.js and the page's copy, from clients/js/lmd.js
	cd clients/js && node build.mjs > lmd.min.js.new && mv lmd.min.js.new lmd.min.js
	cp clients/js/lmd.js llamacpp_mqtt_deploy/gateway/page/lmd.js

# Some 400 MB of Chromium, and so not a part of `test`: there these tests are skipped where it is missing.
$(STAMPS)/browser: | $(STAMPS)/install
	@if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then \
		if $(CAN_APT); then $(APT) update && $(APT) install --no-install-recommends -y chromium chromium-driver fonts-liberation fonts-noto-color-emoji fonts-inter; \
		else echo "The page is tried in Chromium. On Debian: sudo apt-get install chromium chromium-driver" >&2; exit 1; fi; \
	fi
	$(PIP) install --quiet 'selenium>=4.30,<5'
	@mkdir -p $(@D) && touch $@

browser: install broker node-packages $(STAMPS)/browser ## try the chat page in a headless Chromium
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m pytest -q tests/page $(PYTEST_ARGS)

screenshots: install broker $(STAMPS)/browser ## the pictures of the chat page in docs/
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m tests.page.screenshots

top-picture: install ## the picture of `lmd top` in docs/
	$(BIN)/python docs/top_picture.py

test: install inprocess broker tools node-packages ## the whole suite, with everything that it needs
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m pytest $(XDIST) $(PYTEST_ARGS)

# Some 100 MB of Prometheus, and so not a part of `test`: there these tests are skipped where it is missing. Its service is not started.
prometheus:
	@if ! command -v prometheus >/dev/null || ! command -v prometheus-node-exporter >/dev/null; then \
		if $(CAN_APT); then \
			if [ ! -e /usr/sbin/policy-rc.d ]; then \
				trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
				printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
			fi; \
			$(APT) update && $(APT) install --no-install-recommends -y prometheus prometheus-node-exporter; \
			if [ -d /run/systemd/system ]; then systemctl disable --quiet prometheus.service prometheus-node-exporter.service; fi; \
		else echo "The metrics are tried with Prometheus. On Debian and Ubuntu: sudo apt-get install prometheus prometheus-node-exporter" >&2; exit 1; fi; \
	fi

test-metrics: install broker prometheus ## try metrics, dashboard and alerts with a real Prometheus and promtool
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m pytest -q tests/metrics $(PYTEST_ARGS)

test-fast: install broker ## the suite without the in-process engine, until the first failure
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m pytest $(XDIST) -m "not inprocess" -x $(PYTEST_ARGS)

# Takes 5 to 20 minutes. SEED chooses the changes, ONLY the files (ONLY=core/history.py).
SEED ?= 1
COUNT ?= 40
ONLY ?=
mutants: install broker ## break the code in COUNT small ways, one at a time, and count those that the tests notice
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m tests.support.mutations --seed $(SEED) --count $(COUNT) --only "$(ONLY)"

# All of it takes about half an hour on two idle cores; BENCH_ARGS="--only a,b --json new.json --compare old.json".
BENCH_ARGS ?=
bench: install inprocess broker ## measure what the bus costs beside the engine alone (BENCH_ARGS="--only a,b")
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m benchmarks $(BENCH_ARGS)

# About five minutes. HOSTILE_MESSAGES=20000 is what the suite does.
HOSTILE_MESSAGES ?= 100000
hostile: install broker ## send HOSTILE_MESSAGES hostile messages with good requests among them, and print what it cost
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" HOSTILE_MESSAGES=$(HOSTILE_MESSAGES) $(BIN)/python -m pytest -q -s -p no:cacheprovider tests/service/test_hostile.py -k flood

# Some minutes, and some seconds with FLOOD_MESSAGES=200, which is what the suite does.
FLOOD_MESSAGES ?= 5000
flood: install broker ## let one client flood the worker with FLOOD_MESSAGES of each kind while another one chats, and print what that one saw
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" FLOOD_MESSAGES=$(FLOOD_MESSAGES) $(BIN)/python -m pytest -q -s -p no:cacheprovider tests/service/test_two_clients.py

# A minute or two. HOSTILE_HTTP=800 is what the suite does; HOSTILE_SEED chooses the requests.
HOSTILE_HTTP ?= 20000
HOSTILE_SEED ?= 9
hostile-http: install broker ## send HOSTILE_HTTP hostile requests and frames to the gateway with good ones among them, and print what it cost
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" HOSTILE_HTTP=$(HOSTILE_HTTP) HOSTILE_SEED=$(HOSTILE_SEED) $(BIN)/python -m pytest -q -s -p no:cacheprovider -o timeout=1800 tests/gateway/test_hostile_http.py tests/gateway/test_hostile_wire.py tests/gateway/test_hostile_sockets.py

# A minute or two. The suite does IDLE_STREAMS=100 ACTIVE_STREAMS=32.
IDLE_STREAMS ?= 1000
ACTIVE_STREAMS ?= 256
ACTIVE_ROUNDS ?= 8
gateway-load: install broker ## read IDLE_STREAMS idle and ACTIVE_STREAMS active streams at once through the gateway, and print what it cost
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" IDLE_STREAMS=$(IDLE_STREAMS) ACTIVE_STREAMS=$(ACTIVE_STREAMS) ACTIVE_ROUNDS=$(ACTIVE_ROUNDS) $(BIN)/python -m pytest -q -s -p no:cacheprovider -o timeout=1800 tests/gateway/test_many_streams.py

# About ten minutes. nats-server and rabbitmq-server come from apt and are tested where they are installed.
brokers: install broker ## try the promises on every broker that is installed, and write the table in docs/brokers.md
	@if command -v npm >/dev/null; then npm install --silent --no-fund --prefix $(VENV)/node aedes@1.2.0; fi
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m tests.support.broker_table

# The first time some minutes, for a Debian 13 with Home Assistant below the cache folder (HOME_ASSISTANT_CACHE); then about two. Exit code 3:
# it cannot be set up on this machine, and a line says why.
.PHONY: test-homeassistant
test-homeassistant: ## try the integration in a real Home Assistant (as root; PYTEST_ARGS="-k light")
	@if ! command -v debootstrap >/dev/null && $(CAN_APT); then $(APT) update && $(APT) install --no-install-recommends -y debootstrap; fi
	@tests/home_assistant/run.sh $(PYTEST_ARGS)

# In an environment of its own: pip-audit brings two dozen packages that the product does not need. Exit code 3: the database of
# vulnerabilities was out of reach, and nothing was audited.
$(STAMPS)/audit: | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --disable-pip-version-check install --quiet pip-audit
	@mkdir -p $(@D) && touch $@

audit: $(STAMPS)/audit ## ask pip-audit about every pinned dependency
	@$(BIN)/python -m tests.support.dependency_audit $(VENV)/audit/bin/pip-audit

check: install ## lint, format and types
	$(BIN)/ruff check $(PROJECT)
	$(BIN)/ruff format --check $(PROJECT)
	$(BIN)/mypy

format: install ## put the code into its format
	$(BIN)/ruff check --fix $(PROJECT)
	$(BIN)/ruff format $(PROJECT)

# REQUESTS=10000 FAULTS=300 takes about half an hour. SEED chooses what happens; a run that fails says how to run it again.
# FAULTS_ARGS="--shrink" looks for the fewest faults that still fail, --write-docs puts the table into docs/reliability.md.
REQUESTS ?= 1000
FAULTS ?= 60
FAULTS_ARGS ?=
faults: install broker ## kill, freeze, cut, fill and flood everything while clients ask, and count what was lost (REQUESTS, FAULTS, SEED)
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m tests.faults --requests $(REQUESTS) --faults $(FAULTS) $(if $(filter command line environment,$(origin SEED)),--seed $(SEED)) $(FAULTS_ARGS)

# PostgreSQL has to be there; the same variables.
faults-pool: install broker ## the same for a pool of four workers with PostgreSQL (REQUESTS, FAULTS, SEED)
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m tests.faults --pool --requests $(REQUESTS) --faults $(FAULTS) $(if $(filter command line environment,$(origin SEED)),--seed $(SEED)) $(FAULTS_ARGS)

# Some four minutes; the suite does DATABASE_CRASHES=5. DATABASE_SEED chooses the moments.
DATABASE_CRASHES ?= 100
DATABASE_SEED ?= 3
database-crashes: install tools ## kill PostgreSQL DATABASE_CRASHES times while a pool uses its journal, and look for what is lost, doubled or torn
	DATABASE_CRASHES=$(DATABASE_CRASHES) DATABASE_SEED=$(DATABASE_SEED) $(BIN)/python -m pytest -q -s -p no:cacheprovider -o timeout=3600 tests/stores/test_database_crashes.py

# Four minutes; PostgreSQL comes with `tools`.
fleet: install broker tools ## 200 conversations of 10 turns over four workers, and what four workers bring over one
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" FLEET_CONVERSATIONS=200 FLEET_TURNS=10 $(BIN)/python -m pytest -q -p no:cacheprovider -o timeout=600 tests/pool/test_conversations.py
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m benchmarks.fleet
	$(BIN)/python -m benchmarks.long_queue

# MINUTES=5 for a look.
MINUTES ?= 30
soak: install broker ## MINUTES at full load with cancels: memory, threads, descriptors and rows have to stay what they were
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" $(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

# --- the product -----------------------------------------------------------------------------------------------------

demo: $(STAMPS)/demo ## a broker, a small model and the daemon on this machine (DEMO_ONCE=1: end after the conversation)
	$(BIN)/lmd demo

config: install ## the effective configuration with the origin of each value
	$(BIN)/lmd config

config-example: install ## write config/config.example.toml from the settings
	$(BIN)/lmd config --example > config/config.example.toml.new
	mv config/config.example.toml.new config/config.example.toml

schema: install ## print the JSON Schema of the configuration
	@$(BIN)/lmd config --schema

docs: install ## write the generated parts of docs/
	$(BIN)/python docs/generate.py

build: install ## wheel and source distribution in dist/
	@rm -f dist/llamacpp_mqtt_deploy-*
	$(BIN)/python -m build
	@rm -rf build

# What systems in directories are made and booted with; in .roots/, some 2 GB for both releases, kept until `make clean-roots`.
roots-tools:
	@for tool in debootstrap:debootstrap systemd-nspawn:systemd-container; do \
		if ! PATH="$$PATH:/usr/sbin" command -v "$${tool%%:*}" >/dev/null && $(CAN_APT); then $(APT) update && $(APT) install --no-install-recommends -y "$${tool#*:}"; fi; \
	done
.PHONY: roots-tools

# Some minutes the first time, then about half a minute for each release. As root.
RELEASES ?= bookworm trixie
deb: build roots-tools ## Debian packages in dist/, each built and checked by lintian in a system of its release (RELEASES="trixie")
	@rm -f dist/*.deb
	$(BIN)/python -m distribution.deb_build $(RELEASES)

test-deb: deb broker ## install, ask, upgrade, remove and purge the packages on machines that are booted for it
	LMD_TEST_DEB="$(RELEASES)" LMD_DIST=dist $(BIN)/python -m pytest -q -s -p no:cacheprovider -o timeout=900 tests/debian $(PYTEST_ARGS)

# About a quarter of an hour: every instruction is emulated. TESTS chooses other tests.
TESTS ?=
test-arm64: build roots-tools ## the demo and a part of the tests on an emulated arm64 machine
	@if ! command -v qemu-aarch64-static >/dev/null && $(CAN_APT); then $(APT) update && $(APT) install --no-install-recommends -y qemu-user-static; fi
	$(BIN)/python -m distribution.arm64_trial $(TESTS)

# In an environment of its own, as pip-audit.
$(STAMPS)/twine: | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/twine
	$(VENV)/twine/bin/python -m pip --disable-pip-version-check install --quiet twine
	@mkdir -p $(@D) && touch $@

release: deb $(STAMPS)/twine ## wheel, source distribution, Debian packages and their checksums in dist/, all of them checked
	$(VENV)/twine/bin/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/python -m distribution.release_files dist

# --one-file-system: nothing that should still be mounted there is followed.
clean-roots: ## remove the Debian systems that packages are built and tried in
	rm -rf --one-file-system .roots

clean: ## remove what was built
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find llamacpp_mqtt_deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +
