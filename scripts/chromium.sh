#!/usr/bin/env bash
# Debian's Chromium for the browser tests, installed where it is missing (what `make test-browser` calls first).
set -euo pipefail

packages=(chromium fonts-dejavu-core)
if command -v chromium > /dev/null; then
    exit 0
fi
if ! command -v apt-get > /dev/null; then
    echo "test-browser: chromium is not installed, and there is no apt-get to install it with: install it by this system's own means" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "test-browser: chromium is not installed; as root: apt-get install ${packages[*]}" >&2
    exit 1
fi
echo "test-browser: installing ${packages[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } > "$log" 2>&1; then
    tail -5 "$log" >&2
    echo "test-browser: chromium could not be installed; the last lines of apt-get stand above" >&2
    exit 1
fi
