"""A token's time on a CPU beside llama.cpp's, at 32, 8 and 4 bits.

npm install node-llama-cpp        in any folder
pip install gguf
python benchmarks/llama_cpp.py FOLDER       writes results/llama-cpp-*.md

Both have random weights of the same sizes: a ParaGRU here, a llama there, which also has attention over the
few tokens so far and none of the recurrence. llama.cpp's Q8_0 and Q4_0 have a scale of 16 bits for 32
weights, and round what they multiply with to 8 bits too; ours have a scale and a bias for 64, in the dtype of
the model that was quantized, and multiply with 24 bits where that is float32, with 16 where it is float16.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"

import gguf
import numpy as np
import quantization
from machine import write_results
from timing import PAUSE

WIDTH, LAYERS, WIDE, VOCABULARY, HEADS = 1024, 4, 2816, 32000, 16
TYPES = {
    "32": gguf.GGMLQuantizationType.F32,
    "8": gguf.GGMLQuantizationType.Q8_0,
    "4": gguf.GGMLQuantizationType.Q4_0,
}
# bits -> whose -> the precision of `quantization.at`; or llama.cpp's
KINDS = {
    "32": {"here": "float32", "llama.cpp": None},
    "8": {"here, float32": "float32, 8 bits", "here, float16": "float16, 8 bits", "llama.cpp": None},
    "4": {"here, float32": "float32, 4 bits", "here, float16": "float16, 4 bits", "llama.cpp": None},
}
# Answers each line, "file tokens", with the milliseconds of each of so many tokens.
NODE = """
import readline from "node:readline";
const [folder, threads] = [process.argv[2], Number(process.argv[3])];
const { getLlama } = await import(`file://${folder}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({ gpu: false, build: "never", maxThreads: threads, logLevel: "error" });
const sequences = new Map();
for await (const line of readline.createInterface({ input: process.stdin })) {
  const [file, tokens] = line.split(" ");
  if (!sequences.has(file)) {
    const model = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
    const context = await model.createContext({ contextSize: 256, threads });
    sequences.set(file, context.getSequence());
  }
  const sequence = sequences.get(file);
  await sequence.clearHistory();
  const took = [];
  let before;
  for await (const token of sequence.evaluate([1, 7], { temperature: 0, yieldEogToken: true })) {
    const now = performance.now();
    if (before !== undefined) took.push(now - before);  // the first also reads the prompt
    if (took.length >= Number(tokens)) break;
    before = performance.now();
  }
  console.log(JSON.stringify(took));
}
"""


def write_llama(file, kind):
    """A llama of our sizes with random weights."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    special, letters = ["<unk>", "<s>", "</s>"], [f"<0x{n:02X}>" for n in range(256)]
    tokens = special + letters + [f"t{n}" for n in range(VOCABULARY - 259)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (VOCABULARY - 259)
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types(kinds)

    def add(name, *shape):
        weight = rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        if len(shape) == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, np.ones(shape, np.float32) if len(shape) == 1 else weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH)
    for i in range(LAYERS):
        for name, *shape in (
            ("attn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_norm", WIDTH),
            ("ffn_gate", WIDE, WIDTH),
            ("ffn_up", WIDE, WIDTH),
            ("ffn_down", WIDTH, WIDE),
        ):
            add(f"blk.{i}.{name}.weight", *shape)
    add("output_norm.weight", WIDTH)
    add("output.weight", VOCABULARY, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """llama.cpp in a process of its own, which waits between the questions."""

    def __init__(self, folder, threads, script):
        script.write_text(NODE)  # not as an argument: node-llama-cpp starts a node with the same ones
        command = ["node", str(script), str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def milliseconds(self, file, tokens):
        print(file, tokens, file=self.process.stdin, flush=True)
        return statistics.median(json.loads(self.process.stdout.readline()))


def measure(folder, files, threads, rounds):
    """Milliseconds a token, a round each: (bits, whose) -> numbers."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    each = [(bits, who, precision) for bits, kinds in KINDS.items() for who, precision in kinds.items()]
    ours = {precision: quantization.at(precision) for _, _, precision in each if precision}
    llama = Llama(folder, threads, files["32"].with_name("llama.mjs"))
    found = {(bits, who): [] for bits, who, _ in each}
    for turn in range(-1, rounds):
        for bits, who, precision in each:
            time.sleep(PAUSE)
            if precision:
                took = 1e3 * quantization.seconds_a_token(ours[precision], 9)
            else:
                took = llama.milliseconds(files[bits], 9)
            if turn >= 0:
                found[bits, who].append(took)
    llama.process.stdin.close()
    llama.process.wait()
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where node_modules is")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--files", type=Path, help="keep the models in this folder, or take them from it")
    asked = parser.parse_args()
    package = asked.folder / "node_modules" / "node-llama-cpp" / "package.json"
    version, rows = json.loads(package.read_text())["version"], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = {bits: folder / f"llama-{bits}.gguf" for bits in TYPES}
        for bits, file in files.items():
            if not file.exists():
                write_llama(file, TYPES[bits])
        for threads in asked.threads:
            found = measure(asked.folder.resolve(), files, threads, asked.rounds)
            for (bits, who), took in found.items():
                rows.append((threads, bits, who, f"{statistics.median(took):.2f}", f"{min(took):.2f}"))
                print(*rows[-1], sep=" | ", flush=True)
    caption = (
        "Milliseconds a token, one sequence, d = 1024, 4 layers, MLP 2816, vocabulary 32000, random weights: "
        f"a ParaGRU here and a llama in llama.cpp (node-llama-cpp {version}; F32, Q8_0, Q4_0), its sampling "
        f"included. Each figure is of {asked.rounds} rounds in which all take turns, a round's the median of "
        "9 tokens."
    )
    write_results("llama-cpp", caption, ["threads", "bits", "where", "median", "fastest"], rows)


if __name__ == "__main__":
    main()
