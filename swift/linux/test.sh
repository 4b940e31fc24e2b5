#!/usr/bin/env bash
# test.sh TOOLCHAIN [WORK] : builds and tests the Swift package with what install-swift.sh put into TOOLCHAIN.
# Twice: the parts without Core ML alone, and everything against the stand-ins for Apple's frameworks; warnings
# are errors. Builds go to WORK, a temporary folder if not given. Needs root.
set -euo pipefail
toolchain=${1:?usage: test.sh TOOLCHAIN [WORK]}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ $# -gt 1 ]; then
  work=$2
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

"$here/run.sh" "$toolchain" "$root" swift format lint --strict --recursive --configuration swift/.swift-format \
  Package.swift swift examples/ChatApp
rm -rf "$work/swift"
cp -R "$root/Package.swift" "$root/swift" "$work/"
mkdir -p "$work/tests/data"
cp -R "$root/tests/data/tools" "$work/tests/data/"
cp "$root"/examples/ChatApp/ChatApp/Conversation.swift "$root"/examples/ChatApp/Tests/*.swift \
  "$work/swift/ParaRNNTests/"
python3 "$root/swift/doc_samples.py" > "$work/swift/ParaRNNTests/DocSamples.swift"

# One folder for each way: with a shared one, the stand-in of the second would be found by the first.
# The example app's Observation library lacks a symbol on Linux that only a crash would call.
run() {
  "$here/run.sh" "$toolchain" "$work" env ${2:+"$2"} swift "${@:3}" --scratch-path "/src/$1" \
    -Xswiftc -warnings-as-errors -Xlinker --allow-shlib-undefined
}
run build-pure "" build
run build-pure "" test
if "$here/run.sh" "$toolchain" "$work" build-pure/debug/pararnn-chat no.mlpackage 2> "$work/said"; then
  echo "pararnn-chat ran without Core ML" >&2
  exit 1
fi
grep -q "has no Core ML" "$work/said"
run build-stub PARARNN_COREML_STUB=1 build
run build-stub PARARNN_COREML_STUB=1 test
"$here/run.sh" "$toolchain" "$work" build-stub/debug/pararnn-chat --help > /dev/null
if "$here/run.sh" "$toolchain" "$work" build-stub/debug/pararnn-chat no.mlpackage 2> "$work/said"; then
  echo "pararnn-chat took a model that does not exist" >&2
  exit 1
fi
grep -q "no.mlpackage does not exist" "$work/said"
