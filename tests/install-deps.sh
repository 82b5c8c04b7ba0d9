#!/bin/bash
# Installs what the build needs from Debian's packages: LLVM 19.
set -e
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
echo "installing llvm-19-dev" >&2
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends llvm-19-dev >/dev/null
command -v llvm-config-19 >/dev/null
