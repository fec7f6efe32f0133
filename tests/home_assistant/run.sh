#!/usr/bin/env bash
# Runs tests/home_assistant in a real Home Assistant: `make test-homeassistant`. Arguments go to pytest.
#
# Home Assistant needs Python 3.13.2, so it gets a Debian 13 of its own below the cache folder, made by debootstrap once (some
# minutes) and used again while the versions below stay what they are. Broker, worker and Home Assistant run in there. Mirror, pip's
# configuration, certificates and name servers are this machine's. Exit code 3: it cannot be set up here, and a line says why.
set -euo pipefail

repository="$(cd "$(dirname "$0")/../.." && pwd)"
cache="${HOME_ASSISTANT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llamacpp-mqtt-deploy}"
suite=trixie
packages=python3,python3-venv,python3-dev,g++,ca-certificates,mosquitto,libgomp1,libturbojpeg0
components="ai_task assist_pipeline camera conversation diagnostics light mqtt repairs"
home_assistant=("homeassistant==2025.12.4" "pytest-homeassistant-custom-component==0.13.301" "mypy>=1.15,<2")

cannot() {
	echo "The tests in Home Assistant cannot run here: $1" >&2
	exit 3
}

[ "$(id -u)" = 0 ] || cannot "debootstrap and chroot need root. Run it as root, or in a container as root."
command -v debootstrap >/dev/null || cannot "debootstrap is missing. On Debian and Ubuntu: apt-get install debootstrap"
unshare --mount true 2>/dev/null || cannot "this machine does not let root mount anything (a container without CAP_SYS_ADMIN?)."

cannot_install() {
	cannot "pip could not install $1 (no network, or no package index?): $(grep -E '^ERROR' "$root.log" | tail -n 1) See $root.log"
}

# The mirror that apt uses here, if it is one of Debian; else debootstrap's own choice.
mirror() {
	{ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } |
		sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb +(\[[^]]*\] +)?([^ ]+) .*/\2/p' | grep -E '/debian/?$' | head -n 1
}

# What runs in the root: its own /proc and /dev, this repository read-only under /src, in mounts that end with the command.
inside() {
	unshare --mount bash -euc '
		root=$1 repository=$2; shift 2
		mkdir -p "$root/src"
		mount -t proc proc "$root/proc"
		mount --rbind /dev "$root/dev"
		mount --bind "$repository" "$root/src"
		mount -o remount,bind,ro "$root/src"
		cd "$root"; exec chroot "$root" /usr/bin/env -C /src "$@"
	' - "$root" "$repository" "$@" 9>&-
}

requirements() { # of the worker, for the demo model too
	inside /usr/bin/python3 -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["demo"]))'
}

of_components() { # what Home Assistant would install when it sets these components up
	inside /homeassistant/bin/python -c '
import json, pathlib, sys, homeassistant.components as components
folder, seen, wanted = pathlib.Path(components.__file__).parent, set(), set()
def add(domain):
    if domain not in seen:
        seen.add(domain)
        manifest = json.loads((folder / domain / "manifest.json").read_text())
        wanted.update(manifest.get("requirements", []))
        for other in manifest.get("dependencies", []):
            add(other)
for domain in sys.argv[1:]:
    add(domain)
print("\n".join(sorted(wanted)))' $components
}

build() {
	local from; from="$(mirror || true)"
	echo "Making a Debian $suite with Home Assistant in $root (once; some minutes) ..." >&2
	rm -rf "$root"
	mkdir -p "$root"
	debootstrap --variant=minbase --include="$packages" "$suite" "$root" ${from:+"$from"} >"$root.log" 2>&1 ||
		cannot "debootstrap failed (no network, or no mirror with $suite?): $(grep -E '^(E|W):' "$root.log" | tail -n 1) See $root.log"
	cp /etc/resolv.conf /etc/hosts "$root/etc/"
	if [ -e /etc/ssl/certs/ca-certificates.crt ]; then cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"; fi
	for each in /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
		if [ -e "$each" ]; then cp "$each" "$root/etc/pip.conf"; fi
	done
	{
		inside python3 -m venv /homeassistant &&
			inside /homeassistant/bin/python -m pip install -q "${home_assistant[@]}" &&
			of_components >"$root/tmp/components.txt" &&
			inside /homeassistant/bin/python -m pip install -q -r /tmp/components.txt
	} >>"$root.log" 2>&1 || cannot_install "Home Assistant"
	touch "$root/complete"
}

build_worker() {
	{
		inside python3 -m venv --clear /worker &&
			requirements >"$root/tmp/worker.txt" &&
			inside /worker/bin/python -m pip install -q -r /tmp/worker.txt -c constraints.txt
	} >>"$root.log" 2>&1 || cannot_install "the worker's packages"
	echo "$worker_pins" >"$root/worker/pins"
}

# A folder of wheels that is named for this machine need not exist in there.
unset PIP_FIND_LINKS
pins="$(echo "$suite $packages $components ${home_assistant[*]}" | sha256sum | cut -c 1-12)"
worker_pins="$({
	cat "$repository/constraints.txt"
	sed -n '/^dependencies = /,/^]/p; /^demo = /p' "$repository/pyproject.toml"
} | sha256sum)"
root="$cache/home-assistant-$pins"
mkdir -p "$cache"
exec 9>"$cache/home-assistant.lock"
flock -n 9 || { echo "Waiting for another run of these tests ..." >&2; flock 9; }
if [ ! -e "$root/complete" ]; then
	build
	# Roots of earlier pins.
	find "$cache" -maxdepth 1 -name 'home-assistant-????????????*' ! -name "home-assistant-$pins*" -exec rm -rf {} +
fi
[ "$(cat "$root/worker/pins" 2>/dev/null)" = "$worker_pins" ] || build_worker

export PYTHONDONTWRITEBYTECODE=1 HOME=/root LC_ALL=C.UTF-8
if [ "${TYPES:-1}" = 1 ]; then
	inside /homeassistant/bin/python -m mypy --config-file tests/home_assistant/mypy.ini --cache-dir /tmp/mypy
fi
inside /homeassistant/bin/python -m pytest --rootdir tests/home_assistant -c tests/home_assistant/inside.ini -p no:cacheprovider "$@" tests/home_assistant
