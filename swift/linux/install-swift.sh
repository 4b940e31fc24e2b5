#!/usr/bin/env bash
# install-swift.sh FOLDER : Debian 13's Swift 6 toolchain in FOLDER, as a root file system of its own.
# For Debian and Ubuntu; needs root. About 2 minutes and 3 GB. Does nothing where the toolchain already stands.
set -euo pipefail
root=${1:?usage: install-swift.sh FOLDER}
[ -e "$root/installed" ] && exit 0

if ! command -v debootstrap > /dev/null || [ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ]; then
  apt-get update -q
  apt-get install -y -q --no-install-recommends debootstrap debian-archive-keyring
fi
# This machine's own Debian mirror if it has one, else debootstrap's default.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null |
  grep -v '^ *#' | grep -oE 'https?://[^ ]+/debian/?( |$)' | tr -d ' ' | head -1 || true)
debootstrap --variant=minbase trixie "$root" ${mirror:+"$mirror"}
cp /etc/resolv.conf "$root/etc/resolv.conf"
chroot "$root" apt-get update -q
# libc6-dev is only recommended by swiftlang, but nothing links without it.
chroot "$root" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -q --no-install-recommends swiftlang libc6-dev
chroot "$root" apt-get clean
touch "$root/installed"
