"""Fetching from a hub that is served on this machine: what is taken, what is kept, what each failure says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from headrace.errors import ModelFilesError, ModelNotFoundError, UnsupportedModelError
from headrace.workers.models import download, find, model_name, remove, resolve, verify
from tests.workers.models.fake_hub import COMMIT, FakeHub

REPO = "org/tiny-model"
WEIGHTS = save({"a": torch.arange(50_000, dtype=torch.float32)})


def model_files() -> dict[str, bytes]:
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "model.safetensors": WEIGHTS,
        # None of these is wanted:
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "vocab.json": b"{}",
        "README.md": b"# Tiny",
        "onnx/model.onnx": b"x",
        "consolidated.safetensors": WEIGHTS,
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.files[REPO] = model_files()
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with hub.running():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def failure(model: str = REPO) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(model)
    return caught.value.message


def test_only_what_a_model_needs_is_fetched(hub: FakeHub, models: Path) -> None:
    folder = resolve(REPO)
    assert folder == models / "org--tiny-model"
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted | {"headrace.json"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    note = json.loads((folder / "headrace.json").read_bytes())
    assert (note["model"], note["revision"], note["source"]) == (REPO, COMMIT, f"{hub.url}/{REPO}")
    assert model_name(REPO, folder) == "tiny-model"
    assert verify(REPO) == (folder, 5)


def test_the_second_time_nothing_is_asked(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(REPO)
    asked = sum(hub.requests.values())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(REPO) == find(REPO) == folder
    assert sum(hub.requests.values()) == asked


def test_sharded_weights_are_those_of_the_index(hub: FakeHub) -> None:
    del hub.files[REPO]["model.safetensors"]
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in shards.items():
        hub.files[REPO][name] = save({tensor: torch.zeros(1000)})
    hub.files[REPO]["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    folder = resolve(REPO)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(shards.values())


def test_an_old_tokenizer_is_taken_when_there_is_no_new_one(hub: FakeHub) -> None:
    del hub.files[REPO]["tokenizer.json"]
    folder = resolve(REPO)
    assert (folder / "vocab.json").is_file()


def test_progress_counts_bytes_to_the_end(hub: FakeHub) -> None:
    calls = []
    resolve(REPO, progress=lambda *call: calls.append(call))
    weights = [call for call in calls if call[0].startswith("downloading from")]
    assert weights[-1][1:] == (len(WEIGHTS), len(WEIGHTS))
    assert [call[1] for call in weights] == sorted(call[1] for call in weights)


@pytest.mark.parametrize("revision", ["v1.0", COMMIT, "refs/pr/1"])
def test_a_revision_has_a_folder_of_its_own(hub: FakeHub, models: Path, revision: str) -> None:
    folder = resolve(f"{REPO}@{revision}")
    assert folder.parent == models
    assert folder.name == f"org--tiny-model@{revision.replace('/', '--')}"
    assert model_name(f"{REPO}@{revision}", folder) == "tiny-model"
    assert "has no revision 'v9'" in failure(f"{REPO}@v9")


# ------------------------------------------------------------------------------------------------------ broken networks


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: FakeHub) -> None:
    hub.cut_after["model.safetensors"] = 70_000
    folder = resolve(REPO)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    starts = [int(re.findall(r"\d+", asked)[0]) for name, asked in hub.ranges if name == "model.safetensors"]
    assert starts == [70_000, 140_000]


def test_an_interrupted_download_goes_on_in_the_next_run(hub: FakeHub, models: Path) -> None:
    hub.cut_after["model.safetensors"] = 70_000

    def progress(phase: str, done: int, total: int | None) -> None:
        if total == len(WEIGHTS) and done >= 140_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(REPO, progress=progress)
    part = models / ".org--tiny-model.part" / f"hub-{COMMIT}" / "model.safetensors.part"
    kept = part.stat().st_size
    assert kept >= 70_000
    hub.cut_after.clear()
    hub.ranges.clear()
    folder = resolve(REPO)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert ("model.safetensors", f"bytes={kept}-") in hub.ranges
    assert hub.requests[f"/{REPO}/resolve/{COMMIT}/tokenizer.json"] == 1
    assert not part.parent.parent.exists()


def test_a_mirror_without_ranges_starts_again(hub: FakeHub, models: Path) -> None:
    part = models / ".org--tiny-model.part" / f"hub-{COMMIT}" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:1000])
    hub.no_ranges = True
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("leftover", [b"x" * 1000, WEIGHTS + b"more", WEIGHTS[:-1] + b"x"])
def test_damaged_leftovers_are_fetched_again(hub: FakeHub, models: Path, leftover: bytes) -> None:
    part = models / ".org--tiny-model.part" / f"hub-{COMMIT}" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(leftover)
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS


def test_servers_in_trouble_are_asked_again(hub: FakeHub) -> None:
    hub.statuses["model.safetensors"] = [503, 429, 500]
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_stays_in_trouble_is_given_up(hub: FakeHub) -> None:
    hub.statuses["model.safetensors"] = [503] * 20
    assert "broke off 5 times in a row: HTTP Error 503" in failure()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_another_content_than_announced_is_not_used(hub: FakeHub, models: Path, name: str) -> None:
    content = hub.files[REPO][name]
    hub.replace[name] = content[:-1] + b"!"
    with pytest.raises(ModelFilesError, match=rf"{name} has the sha256 .* is not used"):
        resolve(REPO)
    assert not (models / "org--tiny-model").exists()
    hub.replace.clear()
    assert (resolve(REPO) / name).read_bytes() == content


def test_a_damaged_model_is_mended_by_fetching_what_is_damaged(hub: FakeHub) -> None:
    folder = resolve(REPO)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    hub.requests.clear()
    assert resolve(REPO) == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    fetched = [path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path]
    assert fetched == ["model.safetensors"]


def test_verify_finds_a_changed_byte(hub: FakeHub) -> None:
    folder = resolve(REPO)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
    resolve(REPO)  # sizes and headers are right; reading everything at each start would take too long
    with pytest.raises(ModelFilesError, match=r"model\.safetensors differ"):
        verify(REPO)
    remove(REPO)
    assert verify(str(resolve(REPO))) == (folder, 5)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_the_hub_refuses_is_explained(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no model org/none, or it is private, which needs HF_TOKEN" in failure("org/none")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "the token given by HF_TOKEN may not see it" in failure("org/none")
    hub.refuse[REPO] = (403, "GatedRepo")
    assert f"do so at {hub.url}/{REPO}" in failure()
    hub.refuse[REPO] = (502, "")
    assert "answered 502" in failure()


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    message = failure()
    assert "local cache: it is not in" in message
    assert "Hugging Face cache: it is not in" in message
    assert "Hugging Face hub (127.0.0.1:9): cannot be reached: " in message
    assert "HTTPS_PROXY" in message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not asked, because HF_HUB_OFFLINE is set" in failure()


def test_something_else_than_a_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["api/models"] = {"x": b"{}"}
    monkeypatch.setattr(FakeHub, "listing", lambda self, repo: {"hello": 1})
    assert "did not answer as a hub does" in failure()
    monkeypatch.setenv("HF_ENDPOINT", "ftp://127.0.0.1")
    assert "no https address" in failure()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"config.json": b'{"architectures": ["Qwen9ForCausalLM"]}'}, UnsupportedModelError, "Qwen2ForCausalLM"),
        ({"config.json": b"{"}, ModelFilesError, "config.json"),
        ({"config.json": None}, ModelFilesError, "no config.json"),
        ({"model.safetensors": None, "consolidated.safetensors": None}, ModelFilesError, "pickled"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, ModelFilesError, r"\.\./x"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'}, ModelFilesError, "lacks x"),
    ],
)
def test_models_that_cannot_be_served_are_refused_before_the_weights_are_fetched(
    hub: FakeHub, change: dict[str, bytes | None], error: type, words: str
) -> None:
    for name, content in change.items():
        if content is None:
            del hub.files[REPO][name]
        else:
            hub.files[REPO][name] = content
    with pytest.raises(error, match=words):
        resolve(REPO)
    assert not any(path.endswith(".safetensors") for path in hub.requests)


def test_names_in_a_listing_cannot_lead_out_of_the_folder(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    hub.files[REPO] |= {"../config.json": b"evil", ".hidden": b"evil", "/etc/x": b"evil", "a/tokenizer.json": b"evil"}
    folder = resolve(REPO)
    assert b"evil" not in b"".join(path.read_bytes() for path in folder.iterdir())
    assert sorted(path.name for path in models.iterdir()) == [".org--tiny-model.lock", "org--tiny-model"]


@pytest.mark.parametrize(
    "model",
    [
        "",
        "..",
        "../..",
        "org/../x",
        "org/name@../x",
        "org/name@",
        "a b",
        "org/n?x=1",
        "org/na--me",
        "o/n@a..b",
        "x/y/z/..",
    ],
)
def test_ids_cannot_lead_anywhere_else(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ModelNotFoundError, ModelFilesError)):
        resolve(model)
    assert [path.name for path in tmp_path.iterdir()] == []


# ---------------------------------------------------------------------------------------------------------- credentials


def test_the_token_goes_to_the_hub_and_no_further(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    storage = FakeHub()
    storage.files = hub.files
    with storage.running():
        hub.moved_to = storage.url
        resolve(REPO)
    assert set(hub.authorizations) == {"Bearer hf_secret"}
    assert set(storage.authorizations) == {""}


def test_the_stored_token_is_used(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text("hf_stored\n")
    resolve(REPO)
    assert set(hub.authorizations) == {"Bearer hf_stored"}
    remove(REPO)
    hub.authorizations.clear()
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    resolve(REPO)
    assert set(hub.authorizations) == {""}


# --------------------------------------------------------------------------------------------- Hugging Face's own cache


def snapshot(home: Path, files: dict[str, bytes]) -> Path:
    model = home / "hub" / "models--org--tiny-model"
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_what_other_programs_downloaded_is_used(tmp_path: Path, revision: str) -> None:
    folder = snapshot(tmp_path / "huggingface", model_files())
    assert resolve(REPO + revision) == folder
    assert model_name(REPO + revision, folder) == "tiny-model"


def test_a_snapshot_in_part_is_not_used(tmp_path: Path, hub: FakeHub, models: Path) -> None:
    snapshot(tmp_path / "huggingface", {"config.json": b"{}"})
    assert resolve(REPO) == models / "org--tiny-model"
