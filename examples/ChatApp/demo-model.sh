#!/bin/sh
# Xcode's build phase "Demo model": puts the model that mlx-pararnn brings into the app, exported and compiled.
# It is exported once (into Xcode's derived files) by the mlx-pararnn of a checkout's .venv or of PATH. Without one, or
# with an empty DEMO_MODEL, the app is built without a model and asks for a folder.
set -eu
repository=$SRCROOT/../..
PATH="$repository/.venv/bin:$PATH:/opt/homebrew/bin:/usr/local/bin"
model=${DEMO_MODEL-$repository/mlx_pararnn/pocket-model}
resources=$TARGET_BUILD_DIR/$UNLOCALIZED_RESOURCES_FOLDER_PATH
if [ -z "$model" ]; then
  rm -rf "$resources/model.mlmodelc"
  echo "note: DEMO_MODEL is empty, so the app will ask for a model"
  exit 0
fi
if ! command -v mlx-pararnn > /dev/null; then
  echo "note: there is no mlx-pararnn to export a demo model with, so the app will ask for one"
  exit 0
fi
package=$DERIVED_FILE_DIR/demo-model
made_of="$model, $(mlx-pararnn --version)"
if [ "$(cat "$package/made-of" 2> /dev/null)" != "$made_of" ]; then
  mlx-pararnn convert "$model" -o "$package" --to coreml --force
  echo "$made_of" > "$package/made-of"
fi
rm -rf "$resources/model.mlmodelc"
mkdir -p "$resources"
xcrun coremlcompiler compile "$package/model.mlpackage" "$resources"
for file in tokenizer.json tokenizer_config.json chat_template.jinja; do
  if [ -e "$package/$file" ]; then cp "$package/$file" "$resources/"; fi
done
