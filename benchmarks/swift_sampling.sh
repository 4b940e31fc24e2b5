#!/usr/bin/env bash
# swift_sampling.sh TOOLCHAIN : what a token's choice takes in Swift, in a Debug build and in a Release build, with what
# swift/linux/install-swift.sh put into TOOLCHAIN. Needs root.
set -euo pipefail
toolchain=${1:?usage: swift_sampling.sh TOOLCHAIN}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$root/benchmarks/swift_sampling.swift" "$root"/swift/ParaRNN/{Sampler,GenerationOptions,ParaRNNError}.swift \
  "$root"/swift/ParaRNN/Tools/JSON*.swift "$work/"
for mode in -Onone -O; do
  "$root/swift/linux/run.sh" "$toolchain" "$work" \
    bash -c "swiftc $mode -swift-version 6 -parse-as-library -module-name Sampling *.swift -o sampling && echo $mode && ./sampling"
done
