#!/bin/sh
# launch/gpu_wheels.sh FOLDER [libraries]: what training steps, and transformers as their peer, need on a GPU machine that
# has its own torch with CUDA and triton but reaches no registry, as wheels for CPython 3.12 on Linux x86-64 in the
# versions of .venv, and install.sh. libraries: the optional attention and expert kernels that come as wheels too.
set -eu
folder=${1:?give a folder}
pip=".venv/bin/python -m pip --disable-pip-version-check --quiet"
needed="annotated-types braceexpand einops hjson megatron-core msgpack ninja packaging psutil py-cpuinfo pydantic
    pydantic-core safetensors tqdm typing-inspection webdataset xxhash"
peer="accelerate annotated-doc anyio click h11 hf-xet httpcore2 httpx2 huggingface-hub idna markdown-it-py mdurl pygments
    pyyaml regex rich shellingham tokenizers transformers truststore typer"
libraries="flash-attn-4==4.0.0b36 quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1
    nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1
    apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5"

mkdir -p "$folder"
rm -f "$folder"/*.whl "$folder"/*.whl.part* # of an earlier call
$pip freeze | grep -v '^torch==' | sed 's/ @ .*//' >"$folder/versions.txt"
fetch() {
    $pip download --no-deps --only-binary :all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform any --dest "$folder" "$@"
}
# shellcheck disable=SC2086 - names are words
fetch --constraint "$folder/versions.txt" $needed $peer
DS_BUILD_OPS=0 $pip wheel --no-deps --no-build-isolation --wheel-dir "$folder" \
    "$(grep -i '^deepspeed==' "$folder/versions.txt")" # comes as source; its operators are built where they are used
rm "$folder/versions.txt"
if [ "${2:-}" = libraries ]; then
    # shellcheck disable=SC2086
    fetch $libraries
fi
find "$folder" -name '*.whl' -size +57M | while read -r wheel; do # 60 MB: more than some ways of copying take
    split --bytes 57M "$wheel" "$wheel.part"
    rm "$wheel"
done
cat >"$folder/install.sh" <<'END'
#!/bin/sh
# sh install.sh [PYTHON]: installs the wheels beside this file, and nothing from anywhere else
set -eu
folder=$(dirname "$0")
for first in "$folder"/*.whl.partaa; do
    [ -e "$first" ] || continue
    cat "${first%aa}"a? >"${first%.partaa}"
done
"${1:-python3}" -m pip install --no-deps --no-index "$folder"/*.whl
END
echo "$folder: $(ls "$folder" | grep -c '\.whl') files, $(du -sm "$folder" | cut -f1) MiB; there: sh install.sh"
