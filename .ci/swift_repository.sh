#!/usr/bin/env bash
# swift_repository.sh REMOTE TAG [HOME]: the checkout's Swift package as the next commit of another repository, with a tag.
#
# SwiftPM clones a repository with everything that it ever held, here the data of the tests too. Apps name the other one,
# which has the package alone. HOME, where this repository is, stands in its README.
set -euo pipefail
remote=$1 tag=$2 home=${3:-the repository of mlx-pararnn}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$(dirname "$0")/.."
git clone -q "$remote" "$work/repository"
if git -C "$work/repository" rev-parse -q --verify "refs/tags/$tag" > /dev/null; then exit 0; fi  # made before
find "$work/repository" -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf {} +
git archive HEAD Package.swift LICENSE .spi.yml swift/ParaRNN swift/ParaRNNFoundationModels swift/pararnn-chat |
  tar -x -C "$work/repository"
# The tests and what they are made of are not there
sed -i.with-tests -e '/^    \.testTarget(/,/^      exclude: /d' "$work/repository/Package.swift"
rm "$work/repository/Package.swift.with-tests"
cat > "$work/repository/README.md" << END
# ParaRNN for Swift

The Swift package of mlx-pararnn $tag, for apps to name. Documentation, tests and issues: $home.
END
cd "$work/repository"
git add -A
git -c user.name="mlx-pararnn" -c user.email="mlx-pararnn@users.noreply.github.com" commit -q --allow-empty -m "$tag"
git tag "$tag"
git push -q --atomic origin HEAD "$tag"
