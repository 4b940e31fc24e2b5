#!/usr/bin/env bash
# run.sh TOOLCHAIN FOLDER COMMAND... : runs COMMAND in FOLDER with what install-swift.sh put into TOOLCHAIN.
# FOLDER is /src there. No network but the machine itself; the mounts vanish when the command ends. Needs root.
set -euo pipefail
toolchain=$(realpath "${1:?usage: run.sh TOOLCHAIN FOLDER COMMAND...}") folder=$(realpath "$2")
shift 2
mkdir -p "$toolchain/src"
# Without /proc the toolchain does not find its own libraries.
exec unshare --mount --net --propagation private bash -euc '
  root=$0 folder=$1
  shift
  python3 -c "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack(\"16sh22x\", b\"lo\", 0x49))"
  mount -t proc proc "$root/proc"
  mount --bind "$folder" "$root/src"
  exec chroot "$root" bash -euc "cd /src && exec \"\$@\"" bash "$@"
' "$toolchain" "$folder" "$@"
