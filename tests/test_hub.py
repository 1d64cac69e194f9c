"""The hub: cached repositories need no network, only needed files are asked for, failures name the remedy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sfumato

Checkpoint = Callable[[str], tuple[Path, Any]]
SD = "StableDiffusionPipeline"
REPOSITORY = "owner/tiny"
DEAD = "http://127.0.0.1:9"  # nothing listens there

NO_SOCKETS = """
import socket, sys
def refuse(self, address):
    print("CONNECTED", address)
    sys.exit(3)
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = lambda *a, **k: refuse(None, a)
"""
DRAW = """
import sfumato, torch
torch.set_num_threads(1)
pipe = sfumato.DiffusionPipeline.from_pretrained({name!r}, {options})
pipe.set_progress_bar_config(disable=True)
print(pipe("a red cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images.sum())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    base = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN")
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**base, **environment}, timeout=120, check=False
    )


def lay_out(cache: Path, source: Path, commit: str, refs: tuple[str, ...] = ("main",), name: str = REPOSITORY) -> Path:
    """Puts a folder into a hub cache, in the hub client's layout; answers the snapshot."""
    root = cache / f"models--{name.replace('/', '--')}"
    for path in (p for p in source.rglob("*") if p.is_file()):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = root / "snapshots" / commit / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    for ref in refs:
        (root / "refs" / ref).write_text(commit)
    return root / "snapshots" / commit


@pytest.fixture
def cache(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    lay_out(tmp_path / "cache", checkpoint(SD)[0], "a" * 40)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> float:
    pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoint(SD)[0])
    pipe.set_progress_bar_config(disable=True)
    return float(
        pipe("a red cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images.sum()
    )


# --- without a network


@pytest.mark.parametrize(
    ("prelude", "options", "environment"),
    [(NO_SOCKETS, "", {"HF_HUB_OFFLINE": "1"}), (NO_SOCKETS, "local_files_only=True", {}), ("", "", {"HF_ENDPOINT": DEAD})],
    ids=["offline mode", "local files only", "network down"],
)
def test_cached_repository_needs_no_network(
    cache: Path, expected: float, prelude: str, options: str, environment: dict[str, str]
) -> None:
    done = run_python(prelude + DRAW.format(name=REPOSITORY, options=options), HF_HUB_CACHE=str(cache), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)
    assert "CONNECTED" not in done.stdout


def test_local_folder_needs_no_network(checkpoint: Checkpoint, expected: float) -> None:
    done = run_python(NO_SOCKETS + DRAW.format(name=str(checkpoint(SD)[0]), options=""))
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": DEAD}, {"HF_HUB_OFFLINE": "1"}], ids=["network down", "offline mode"])
def test_info_without_network(cache: Path, environment: dict[str, str]) -> None:
    show = f"from sfumato.cli.main import app; app(['info', {REPOSITORY!r}])"
    done = run_python(show, HF_HUB_CACHE=str(cache), COLUMNS="200", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    snapshot = cache / "models--owner--tiny" / "snapshots" / ("a" * 40)
    count = sum(t.numel() for t in load_file(snapshot / "unet" / "diffusion_pytorch_model.safetensors").values())
    assert f"{count:,}" in done.stdout
    shutil.rmtree(snapshot / "vae")
    done = run_python(show, HF_HUB_CACHE=str(cache), **environment)
    assert done.returncode == 1
    assert "the hub cannot be reached and the cache has no 'vae' of owner/tiny: connect once" in done.stderr.replace("\n", " ")


FETCH = """
import time
from sfumato.hub import Source
start = time.time()
try:
    print(Source({name!r}{options}).file("model_index.json"))
except OSError as error:
    print(type(error).__name__, error)
print("seconds", time.time() - start)
"""


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": DEAD}, {"HF_HUB_OFFLINE": "1"}], ids=["network down", "offline mode"])
def test_uncached_repository_without_network(tmp_path: Path, environment: dict[str, str]) -> None:
    start = time.time()
    done = run_python(FETCH.format(name="owner/other", options=""), HF_HUB_CACHE=str(tmp_path), **environment)
    assert "HubError 'owner/other' is not in the cache and the hub cannot be reached" in done.stdout, done.stderr
    assert "connect once to download it, or pass the path of a local folder" in done.stdout
    assert time.time() - start < 30


@pytest.mark.parametrize("name", ["../no", "/no/such/folder", "~/models", "a/b/c", ".", "x\\y", ""])
def test_names_that_cannot_be_repositories(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = (
        r"has no file 'model_index.json'"
        if name == "."
        else r"is not a folder here, and cannot be a hub repository .*check the path"
    )
    with pytest.raises(sfumato.HubError, match=message):
        sfumato.DiffusionPipeline.from_pretrained(name)


@pytest.mark.parametrize("name", ["owner/with space", "own..er/name", "-owner/name"])
def test_names_that_the_hub_refuses(name: str) -> None:
    with pytest.raises(sfumato.HubError, match=rf"'{name}' cannot be fetched from the hub \(.*check the name"):
        sfumato.DiffusionPipeline.from_pretrained(name)


def test_revision_and_subfolder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = checkpoint(SD)[0]
    changed = sfumato.StableDiffusionPipeline.from_pretrained(plain)
    with torch.no_grad():
        changed.unet.conv_in.weight.zero_()
    changed.save_pretrained(tmp_path / "changed")
    lay_out(tmp_path / "cache", plain, "a" * 40)
    lay_out(tmp_path / "cache", tmp_path / "changed", "b" * 40, refs=("zeroed",))
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for revision, zero in ((None, False), ("zeroed", True), ("b" * 40, True), ("a" * 40, False)):
        pipe = sfumato.DiffusionPipeline.from_pretrained(REPOSITORY, revision=revision, **options)
        unet = sfumato.UNet2DConditionModel.from_pretrained(REPOSITORY, subfolder="unet", revision=revision, **options)
        scheduler = sfumato.DDIMScheduler.from_pretrained(REPOSITORY, subfolder="scheduler", revision=revision, **options)
        assert scheduler.config.beta_schedule == "scaled_linear"
        assert bool((pipe.unet.conv_in.weight == 0).all()) is zero is bool((unet.conv_in.weight == 0).all())
    with pytest.raises(sfumato.HubError, match=r"'owner/tiny' is not in the cache"):
        sfumato.DiffusionPipeline.from_pretrained(REPOSITORY, revision="nowhere", **options)


def test_half_downloaded_repository_says_so(cache: Path) -> None:
    snapshot = next((cache / "models--owner--tiny" / "snapshots").iterdir())
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    options: dict[str, Any] = {"cache_dir": cache, "local_files_only": True}
    with pytest.raises(
        sfumato.WeightsError, match=r"no weights in .*unet: expected diffusion_pytorch_model.safetensors, download it again"
    ):
        sfumato.DiffusionPipeline.from_pretrained(REPOSITORY, **options)
    shutil.rmtree(snapshot / "unet")
    with pytest.raises(sfumato.HubError, match=r"has no folder 'unet', which its model_index.json names: download the rest"):
        sfumato.DiffusionPipeline.from_pretrained(REPOSITORY, **options)


# --- with a network: a small server that answers as the hub does


class Hub:
    """A server of one repository, that remembers which files were fetched."""

    def __init__(self, folder: Path, revisions: dict[str, str]) -> None:
        self.fetched: list[str] = []
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                if "Content_Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.requests.append(f"{self.command} {self.path}")
                api, repository = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/"
                if path.startswith(api):
                    self.describe(path[len(api) :].strip("/").split("/"))
                elif path.startswith(repository):
                    self.file(*path[len(repository) :].split("/", 1))
                else:
                    self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

            do_HEAD = do_GET

            def describe(self, rest: list[str]) -> None:
                revision = rest[1] if len(rest) > 1 else "main"
                commit = revisions.get(revision, revision if revision in revisions.values() else None)
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                if commit is None:
                    self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev")
                elif rest[0] == "tree":
                    tree = [
                        {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": "0" * 40}
                        for p in files
                    ]
                    self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                else:
                    siblings = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
                    body = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": commit, "siblings": siblings, "private": False}
                    self.answer(200, json.dumps(body | {"tags": [], "downloads": 0}).encode(), Content_Type="application/json")

            def file(self, revision: str, name: str) -> None:
                path = folder / name
                commit = revisions.get(revision, revision)
                if not path.is_file():
                    self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
                    return
                body = path.read_bytes()
                if self.command == "GET":
                    hub.fetched.append(name)
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                self.answer(200, body, ETag=etag, X_Repo_Commit=commit, Content_Length=str(len(body)))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def repository(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as they are: plain and fp16 weights, pickles, other frameworks, pictures; the autoencoder has no variant."""
    folder = Path(shutil.copytree(checkpoint(SD)[0], tmp_path_factory.mktemp("hub") / "repository"))
    half = sfumato.DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    half.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="300KB")
    half.text_encoder.save_pretrained(folder / "text_encoder", variant="fp16")
    networks = "unet/{n}.bin unet/{n}.fp16.bin unet/{n}.non_ema.safetensors unet/model.onnx vae/{n}.bin extra/{n}.safetensors"
    others = "text_encoder/pytorch_model.bin text_encoder/flax_model.msgpack text_encoder/evil.py README.md assets/picture.png"
    for junk in (f"{networks} {others} v1-5.safetensors v1-5.ckpt").replace("{n}", "diffusion_pytorch_model").split():
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"junk")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    made = Hub(repository, {"main": "c" * 40, "old": "d" * 40})
    yield made
    made.server.shutdown()
    made.server.server_close()


PLAIN = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_needed_files_are_fetched(hub: Hub, repository: Path, tmp_path: Path, expected: float, variant: str | None) -> None:
    code = DRAW.format(name=REPOSITORY, options=f"variant={variant!r}")
    done = run_python(code, HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-2 if variant else 1e-5)
    fetched = set(hub.fetched)
    assert len(fetched) == len(hub.fetched)
    weights = {f for f in fetched if not f.endswith((".json", ".txt"))}
    if variant is None:
        assert weights == PLAIN
    else:
        shards = {p.relative_to(repository).as_posix() for p in repository.glob("unet/*.fp16-*.safetensors")}
        assert len(shards) > 1
        assert weights == {*shards, "text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    hub.fetched.clear()
    again = run_python(code, HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT=hub.endpoint)
    assert again.stdout == done.stdout
    assert hub.fetched == []


def test_single_network_fetches_its_own_files(hub: Hub, tmp_path: Path) -> None:
    call = f"sfumato.AutoencoderKL.from_pretrained({REPOSITORY!r}, subfolder='vae', revision='old')"
    code = f"import sfumato; print({call}.config)"
    done = run_python(code, HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert sorted(hub.fetched) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert "d" * 40 in done.stdout


def test_errors_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    def answer(name: str, options: str = "") -> str:
        return run_python(FETCH.format(name=name, options=options), HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT=hub.endpoint).stdout

    gone = answer("owner/nothing")
    assert "HubError there is no folder and no hub repository 'owner/nothing'" in gone
    assert "check the spelling" in gone
    assert "hf auth login" in gone
    assert "HubError repository 'owner/tiny' has no revision 'nowhere'" in answer(REPOSITORY, ", 'nowhere'")
    wanted = run_python(
        FETCH.format(name=REPOSITORY, options="").replace("model_index", "absent"),
        HF_HUB_CACHE=str(tmp_path),
        HF_ENDPOINT=hub.endpoint,
    )
    assert "HubError owner/tiny has no file 'absent.json': is it a checkpoint of the expected kind" in wanted.stdout


def test_variant_that_the_repository_lacks(hub: Hub, tmp_path: Path) -> None:
    code = f"import sfumato; sfumato.DiffusionPipeline.from_pretrained({REPOSITORY!r}, variant='bf16')"
    done = run_python(code, HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT=hub.endpoint)
    assert "HubError: owner/tiny has no files of variant='bf16': leave it out, or choose another" in done.stderr
    assert not [f for f in hub.fetched if f.endswith(".safetensors")]
