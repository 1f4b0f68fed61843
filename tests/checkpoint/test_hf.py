"""Folders of the Hugging Face hub: the same logits from the same weights, both ways, and the same bits back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from launch.convert import main as convert
from neomoba_dist.checkpoint.hf import HuggingFaceReader, export_folder, import_folder, open_checkpoint
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.checkpoint.tokenizer import chat_template_of
from neomoba_dist.errors import MISTAKE
from neomoba_dist.generate.decode import generate
from neomoba_dist.generate.stage import Stage, batch_of
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.init import views_of
from neomoba_dist.model.neobert import NeoBERT
from tests.chats import CHATML, make_chat_corpus
from tests.evals.runs import make_config, write_run
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0, "original_max_position_embeddings": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False)),
    "qwen3 tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-5)),
    "llama yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=YARN)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=True)),
    "qwen3_moe dense first": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=False, mlp_only_layers=[0])
    ),
}


def published(name: str, folder: Path) -> Any:
    """A random model of `transformers`, saved in two files or more; norms are not all one."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def logits_of(model: NeoBERT, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden_states(batch_of([ids.tolist()], "cpu")))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = published(name, tmp_path / "hub")
    import_folder(HuggingFaceReader(tmp_path / "hub"), tmp_path / "run", file_bytes=50_000)
    ours, config = load_model(tmp_path / "run")
    ids = torch.randint(300, (70,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(ours, ids), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    said = theirs.generate(ids[None, :9], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generate(Stage.of(ours), [ids[:9].tolist()], 12) == [said[0, 9:].tolist()]

    export_folder(CheckpointReader(tmp_path / "run"), tmp_path / "back", torch.float32, None, file_bytes=50_000)
    first, second = saved(tmp_path / "hub"), saved(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), "the same bits"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(ids[None]).logits[0], expected)
    assert HuggingFaceReader(tmp_path / "back").config.model == config.model


@pytest.mark.parametrize(("parallel", "model"), [
    ({"tensor_model_parallel_size": 2}, {}),
    ({"pipeline_model_parallel_size": 2}, {"tie_word_embeddings": True}),
    ({"expert_model_parallel_size": 2}, {"num_experts": 4, "moe_intermediate_size": 48}),
])  # fmt: skip
def test_sharded_checkpoints_go_out(parallel: dict[str, int], model: dict[str, Any], tmp_path: Path) -> None:
    settings = {"objective": "clm", "attention": "full", "qk_norm": True, **model}
    run_ranks(2, train_here, run_config(parallel, model=settings), tmp_path / "run", 1)
    ours, _ = load_model(tmp_path / "run")
    export_folder(CheckpointReader(tmp_path / "run"), tmp_path / "hub", torch.float32, None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    ids = torch.randint(1200, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids[None]).logits[0], logits_of(ours, ids), rtol=0, atol=1e-5)


def published_neobert(folder: Path) -> tuple[dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Random weights in NeoBERT's published layout, and what its published code computes of them."""
    hidden, heads, layers, width = 64, 4, 2, 64
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator) + (len(shape) == 1)

    weights = {"model.encoder.weight": draw(300, hidden), "model.layer_norm.weight": draw(hidden)}
    weights |= {"decoder.weight": draw(300, hidden), "decoder.bias": torch.zeros(300)}
    for i in range(layers):
        name = f"model.transformer_encoder.{i}"
        weights |= {f"{name}.{norm}.weight": draw(hidden) for norm in ("attention_norm", "ffn_norm")}
        weights |= {f"{name}.qkv.weight": draw(3 * hidden, hidden), f"{name}.wo.weight": draw(hidden, hidden)}
        weights |= {f"{name}.ffn.w12.weight": draw(2 * width, hidden), f"{name}.ffn.w3.weight": draw(hidden, width)}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "neobert", "hidden_size": hidden, "num_hidden_layers": layers, "max_length": 512}
    config |= {"num_attention_heads": heads, "intermediate_size": 96, "vocab_size": 300, "norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))

    def rotate(x: torch.Tensor) -> torch.Tensor:  # neighbouring pairs as complex numbers, [L, heads, D]
        size = x.shape[-1]
        angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        x = weights["model.encoder.weight"][ids]
        for i in range(layers):
            part = {key.split(f".{i}.")[1]: value for key, value in weights.items() if f"encoder.{i}." in key}
            normed = F.rms_norm(x, (hidden,), part["attention_norm.weight"], 1e-6)
            q, k, v = (normed @ part["qkv.weight"].T).view(len(ids), heads, -1).chunk(3, dim=-1)
            q, k, v = (tensor.transpose(0, 1) for tensor in (rotate(q), rotate(k), v))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1) @ part["wo.weight"].T
            gate, up = (F.rms_norm(x, (hidden,), part["ffn_norm.weight"], 1e-6) @ part["ffn.w12.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ part["ffn.w3.weight"].T
        return F.rms_norm(x, (hidden,), weights["model.layer_norm.weight"], 1e-6) @ weights["decoder.weight"].T

    return weights, forward


def test_neobert_as_published(tmp_path: Path) -> None:
    weights, forward = published_neobert(tmp_path / "hub")
    reader = HuggingFaceReader(tmp_path / "hub")
    assert reader.left_out() == ["decoder.bias"]
    assert reader.config.model.intermediate_size == 64, "two thirds of 96"
    import_folder(reader, tmp_path / "run")
    ids = torch.randint(300, (50,), generator=torch.Generator().manual_seed(1))
    ours, _ = load_model(tmp_path / "run")
    torch.testing.assert_close(logits_of(ours, ids), forward(ids), rtol=0, atol=2e-5)
    export_folder(CheckpointReader(tmp_path / "run"), tmp_path / "back", torch.float32, None)
    found = saved(tmp_path / "back")
    assert found.keys() == weights.keys() - {"decoder.bias"}
    assert all(torch.equal(found[name], weights[name]) for name in found)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["intermediate_size"] == 96


def test_the_command_and_the_tokenizer(tmp_path: Path) -> None:
    run_ranks(1, train_here, run_config({}, model={"objective": "clm", "attention": "full"}), tmp_path / "run", 1)
    convert = ("launch/convert.py", "--input", tmp_path / "run", "--output", tmp_path / "hub")
    result = run_program(*convert, "--to", "hf", "--dtype", "bfloat16")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'hub'}\n"), result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    text = "def main(argv):"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert model.dtype == torch.bfloat16
    back = ("launch/convert.py", "--from", "hf", "--input", tmp_path / "hub", "--output", tmp_path / "again")
    result = run_program(*back)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    assert run_program("launch/convert.py", tmp_path / "again", "--verify").returncode == 0
    result = run_program("launch/convert.py", tmp_path / "again", "--diff", tmp_path / "hub")
    assert result.returncode == 0, "equal to the last bit"


def test_the_chat_template_goes_along(tmp_path: Path) -> None:
    corpus = make_chat_corpus(tmp_path, CHATML)
    run = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm"))
    assert convert(["--to", "hf", "--input", str(run), "--output", str(tmp_path / "hub")]) == 0
    assert convert(["--from", "hf", "--input", str(tmp_path / "hub"), "--output", str(tmp_path / "again")]) == 0
    template = chat_template_of(CheckpointReader(tmp_path / "again"), corpus.tokenizer())
    assert template is not None
    assert template.source == CHATML
    messages = [{"role": "user", "content": "def main(argv):"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub")
    found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert found == template.encode_prompt(messages)
    ends = GenerationConfig.from_pretrained(tmp_path / "hub").eos_token_id
    assert ends == template.end_of_turn == corpus.tokenizer().id_of("<|im_end|>")


def test_training_starts_from_a_folder_of_the_hub(tmp_path: Path) -> None:
    """Continued pretraining with MoBA, with tp 2, by one flag: the first loss is that of the published weights."""
    sizes = {**SIZES, "vocab_size": 1200}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)).save_pretrained(tmp_path / "hub")
    reader = open_checkpoint(tmp_path / "hub")
    model = {key: size for key, size in sizes.items() if key not in ("max_position_embeddings", "vocab_size")}
    model |= {"head_dim": 16, "qk_norm": True}
    config = run_config({}, model={"objective": "clm", **model, "moba_block_size": 16, "moba_top_k": 2})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    words = ("launch/pretrain.py", "--ds_config", file, "--init_from", tmp_path / "hub", "--max_steps", "1")
    result = run_program(*words, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    trained, _ = load_model(tmp_path / "run")
    for parameter in trained.parameters():
        for shard, view in views_of(parameter):
            apart = (view - reader.read("model", shard)).abs().max()
            assert apart < 3 * config.phase.learning_rate, "one step of AdamW from there"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not read here; qwen3, "),
        ({"attention_bias": True}, '"attention_bias": True has no counterpart here'),
        ({"hidden_act": "gelu"}, "\"hidden_act\": 'gelu' has no counterpart here"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "'llama3' has no counterpart"),
        ({"num_hidden_layers": 2}, "tensor model.layers.2."),
        ({"num_hidden_layers": 4}, "holds no tensor model.layers.3."),
    ],
)
def test_what_has_no_counterpart_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    published("llama", tmp_path / "hub")
    file = tmp_path / "hub" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match="hub") as caught:
        HuggingFaceReader(tmp_path / "hub")
    assert message in str(caught.value)


OWN: list[dict[str, Any]] = [
    {"objective": "clm", "moba_block_size": 8, "moba_top_k": 2, "key_conv_width": 3},
    {"objective": "mlm", "moba_block_size": 8, "moba_top_k": 3, "moba_gate": "kv_group", "key_conv_width": 5},
    {"objective": "clm", "moba_block_size": 8, "moba_top_k": 2, "moba_pooling": "minmax", "qk_norm": False,
     "rope_scaling_type": "yarn", "rope_scaling_factor": 2.0, "original_max_position_embeddings": 256},
    {"objective": "mlm", "moba_block_size": 8, "moba_top_k": 2, "moba_pooling": "representative",
     "position_embedding": "none"},
    {"objective": "clm", "moba_block_size": 8, "moba_top_k": 2, "moba_pooling": "max", "num_experts": 4,
     "moe_intermediate_size": 48, "router_scoring": "sigmoid", "first_k_dense_replace": 1, "tie_word_embeddings": True},
    {"norm": "layernorm", "norm_placement": "post", "objective": "clm", "moba_block_size": 8, "moba_top_k": 2,
     "mlp_activation": "gelu"},
    {"norm": "layernorm", "objective": "mlm", "moba_block_size": 8, "moba_top_k": 2, "mlp_activation": "geglu"},
    {"objective": "mlm", "moba_block_size": 8, "moba_top_k": 2, "type_vocab_size": 2},
    {"prediction_head": True, "objective": "mlm", "norm": "layernorm_no_bias", "moba_block_size": 8, "moba_top_k": 2,
     "attention": "moba,sliding_window,full", "hybrid_layer_count": 0, "sliding_window": 7, "global_tokens": 2,
     "sliding_rope_theta": 100.0, "embedding_norm": True, "tie_word_embeddings": True},
    {"embedding_norm": True, "objective": "clm", "norm_placement": "post", "moba_block_size": 8, "moba_top_k": 2,
     "attention": "moba,sliding_window,full", "hybrid_layer_count": 0, "sliding_window": 7, "prediction_head": True},
]  # fmt: skip
ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "neomoba_dist":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
texts = json.load(open(sys.argv[1]))
for words in sys.argv[2:]:
    kind, folder, out = words.split(":")
    auto = {"clm": AutoModelForCausalLM, "mlm": AutoModelForMaskedLM}[kind]
    model = auto.from_pretrained(folder, trust_remote_code=True)
    longest = max(map(len, texts))
    result = {}
    with torch.no_grad():
        for side in ("left", "right"):
            pad = [[0] * (longest - len(ids)) for ids in texts]
            rows = [p + ids if side == "left" else ids + p for ids, p in zip(texts, pad)]
            mask = torch.tensor([[int(v) for v in ([0] * len(p) + [1] * len(ids) if side == "left" else
                                  [1] * len(ids) + [0] * len(p))] for ids, p in zip(texts, pad)])
            logits = model(input_ids=torch.tensor(rows), attention_mask=mask).logits
            result[side] = [logits[i][mask[i].bool()].clone() for i in range(len(texts))]
        if kind == "clm":
            ids = torch.tensor([texts[0]])
            for decode in ("full", "moba"):
                model.config.decode_attention = decode
                said = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
                result[decode] = said[0, ids.shape[1] :]
    torch.save(result, out)
"""


TEXTS = [torch.randint(1200, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (61, 1, 40)]


@pytest.fixture(scope="module")
def gone_out(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """For each model of OWN a folder: the run, the exported folder, and what was found in a process that cannot import
    the project. One process for all: its imports take seconds."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    cases = [folder / f"case{number}" for number in range(len(OWN))]
    for case, changes in zip(cases, OWN, strict=True):
        run_ranks(1, train_here, run_config({}, model=changes), case / "run", 1)
        export_folder(CheckpointReader(case / "run"), case / "hub", torch.float32, None)
    words = [
        f"{changes['objective']}:{case / 'hub'}:{case / 'found.pt'}" for case, changes in zip(cases, OWN, strict=True)
    ]
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE, str(folder / "texts.json"), *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return cases


@pytest.mark.parametrize("number", range(len(OWN)), ids=[" ".join(map(str, changes.values()))[:40] for changes in OWN])
def test_moba_goes_out_with_its_own_code(gone_out: list[Path], number: int, tmp_path: Path) -> None:
    """Equal logits, padded on either side, and equal greedy texts, in a process that cannot import the project."""
    texts, case = TEXTS, gone_out[number]
    ours, config = load_model(case / "run")
    assert json.loads((case / "hub" / "config.json").read_text())["model_type"] == "neomoba"
    found = torch.load(case / "found.pt", weights_only=True)
    sparse = [logits_of(ours, torch.tensor(ids)) for ids in texts]
    for side in ("left", "right"):
        for logits, expected in zip(found[side], sparse, strict=True):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    if config.model.causal:
        for decode in ("full", "moba"):
            said = generate(Stage.of(ours), texts[:1], 10, decode=decode, prefill="moba")
            assert said == [found[decode].tolist()]
    set_full_attention(ours, True)
    assert (logits_of(ours, torch.tensor(texts[0])) - sparse[0]).abs().max() > 1e-4, "MoBA was not full attention"
    import_folder(HuggingFaceReader(case / "hub"), tmp_path / "back")
    back, _ = load_model(tmp_path / "back")
    assert torch.equal(logits_of(back, torch.tensor(texts[0])), sparse[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"position_embedding": "alibi"}, "neomoba has no counterpart of neomoba.model.position_embedding 'alibi'"),
        (
            {"num_experts": 4, "moe_intermediate_size": 48, "num_shared_experts": 1},
            "neomoba.model.num_shared_experts 1",
        ),
    ],
)
def test_what_cannot_go_out_is_named(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = run_config({}, model={"objective": "clm", "attention": "full", **model})
    run_ranks(1, train_here, config, tmp_path / "run", 1)
    with pytest.raises(CheckpointError) as caught:
        export_folder(CheckpointReader(tmp_path / "run"), tmp_path / "hub", torch.float32, None)
    assert message in str(caught.value)
    assert not (tmp_path / "hub").exists()


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    published("llama", tmp_path / "hub")
    file = sorted((tmp_path / "hub").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name}: cannot be read"):
        HuggingFaceReader(tmp_path / "hub")
    shutil.rmtree(tmp_path / "hub")
    result = run_program("launch/convert.py", "--from", "hf", "--input", tmp_path / "hub", "--output", tmp_path / "run")
    assert result.returncode == MISTAKE
    assert result.stderr.count("\n") == 1
