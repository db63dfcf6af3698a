"""Weights by name, against a server that speaks the hub's protocol."""

import contextlib
import hashlib
import http.server
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hub_server import hub_server  # noqa: F401  a fixture
from safetensors.numpy import save

from solov2_jax.io import InputError
from solov2_jax.weights import hub
from solov2_jax.weights.hub import choose_file, is_remote, open_weights, parse_name
from solov2_jax.weights.hub_client import HubName, card_data, hub_library

huggingface_hub = hub_library()
CARD = b"---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n"


def backbone(seed=0):
    """Returns the bytes of a .safetensors file with torchvision's names."""
    rng = np.random.default_rng(seed)
    state = {"conv1.weight": (8, 3, 7, 7), "layer1.0.conv1.weight": (8, 8, 1, 1)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in state.items()}
    arrays["bn1.weight"] = np.ones(8, np.float32)
    return save(arrays)


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("hf:a/b", HubName("a/b")),
        ("hf:a/b@v1", HubName("a/b", "", "v1")),
        ("hf:a/b/c/d.pth@refs/pr/1", HubName("a/b", "c/d.pth", "refs/pr/1")),
        ("timm/resnet50.a1_in1k", HubName("timm/resnet50.a1_in1k")),
        ("torchvision/resnet50", HubName("timm/resnet50.tv2_in1k")),
        ("torchvision/resnet50.IMAGENET1K_V1", HubName("timm/resnet50.tv_in1k")),
        ("torchvision/resnet18.DEFAULT", HubName("timm/resnet18.tv_in1k")),
    ],
)
def test_names(name, want):
    assert is_remote(name) and parse_name(name) == want


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:a", "hf:/b", "hf:a/", "hf:a/b@", "hf:a/b/../c", "hf:a/..", "hf:a//b", "hf:a/b\n"]
    + ["torchvision/", "torchvision/vgg16", "torchvision/resnet18.V2", "timm/", "hf:ü/ö"],
)
def test_what_is_no_name(name):
    with pytest.raises(InputError, match="init_from: .*(no name|is not known)"):
        parse_name(name)


def test_a_file_that_is_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "x.safetensors").write_bytes(backbone())
    assert not is_remote("timm/x.safetensors") and is_remote("timm/y")
    for name in (
        "timm/x.safetensors",
        "file:timm/x.safetensors",
        f"file://{tmp_path}/timm/x.safetensors",
    ):
        assert open_weights(name).source == "torchvision"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        (["model.safetensors", "pytorch_model.bin", "README.md"], "model.safetensors"),
        (["a.safetensors", "pytorch_model.bin"], "a.safetensors"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["b.pth", "config.json"], "b.pth"),
        (["a.pth", "b.pth"], "several weights files: a.pth, b.pth; name one"),
        (["a.txt"], "holds no weights file"),
        ([], "only nothing"),
    ],
)
def test_which_file_is_taken(files, want):
    if "." in want and " " not in want:
        assert choose_file(files, "hf:a/b") == want
    else:
        with pytest.raises(InputError, match=want):
            choose_file(files, "hf:a/b")


def test_weights_of_timm(server, caplog):
    data = backbone()
    config = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}}
    files = {
        "model.safetensors": data,
        "README.md": CARD,
        "config.json": json.dumps(config).encode(),
    }
    commit = server.add("timm/resnet50.a1_in1k", files)
    with caplog.at_level(logging.INFO, "solov2_jax"):
        weights = open_weights("timm/resnet50.a1_in1k")
    assert weights.path == "timm/resnet50.a1_in1k" and weights.source == "torchvision"
    assert weights.sha256 == hashlib.sha256(data).hexdigest()
    origin = weights.origin
    assert (origin["revision"], origin["licence"]) == (commit, "apache-2.0")
    assert origin["address"] == f"{server.url}/timm/resnet50.a1_in1k"
    assert weights.settings["input.channel_order"] == "RGB"
    assert (
        weights.settings["input.mean"] == [127.5] * 3
        and weights.settings["input.std"] == [51.0] * 3
    )
    assert "licence: apache-2.0" in caplog.text and "asking http" in caplog.text


def test_torchvision_by_the_copy_of_timm(server, caplog):
    server.add("timm/resnet18.tv_in1k", {"pytorch_model.bin": backbone()})
    with caplog.at_level(logging.INFO, "solov2_jax"):
        origin = hub.fetch_weights("torchvision/resnet18")
    assert origin.path.endswith("pytorch_model.bin") and origin.licence == ""
    assert "IMAGENET1K_V1, by timm's copy" in caplog.text and "none is stated" in caplog.text


def test_the_cache_serves_without_network(server, monkeypatch):
    first, second = backbone(1), backbone(2)
    old = server.add("a/b", {"x/w.safetensors": first, "README.md": CARD})
    for name in ("hf:a/b", "hf:a/b/x/w.safetensors"):
        assert hub.fetch_weights(name).revision == old
    sent = len([r for r in server.requests if r.startswith("GET /a/b/resolve")])
    assert sent == 2, "each file once"
    new = server.add("a/b", {"x/w.safetensors": second})
    assert hub.fetch_weights("hf:a/b").revision == new
    assert Path(hub.fetch_weights(f"hf:a/b@{old}").path).read_bytes() == first
    offline(monkeypatch)
    server.requests.clear()
    found = hub.fetch_weights("hf:a/b")
    assert (found.revision, found.licence) == (new, "apache-2.0") and not server.requests
    with pytest.raises(InputError, match="hf:a/c: is not in the cache, and HF_HUB_OFFLINE is set"):
        hub.fetch_weights("hf:a/c")
    with pytest.raises(InputError, match="not in the cache, and HF_HUB_OFFLINE"):
        hub.fetch_weights("hf:a/b/other.pth")


def test_errors_of_the_hub(server, monkeypatch):
    server.add("a/b", {"README.md": CARD})
    server.add("a/gated", {"model.safetensors": backbone(), "README.md": CARD})
    server.repositories["a/gated"].gated, server.token = True, "hf_secret"
    for name, message in {
        "hf:no/repo": "has no such repository, or a private one",
        "hf:no/repo/file.pth": "has no such repository, or a private one",
        "hf:a/b": "holds no weights file .* only README.md",
        "hf:a/b/w.pth": "the repository has no such file",
        "hf:a/b@v9": "there is no such revision",
        "hf:a/gated": "is gated: accept its terms",
        "hf:a/gated/model.safetensors": "is gated",
    }.items():
        with pytest.raises(InputError, match=f"init_from: {name}: .*{message}"):
            hub.fetch_weights(name)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub.fetch_weights("hf:a/gated").licence == "apache-2.0"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="gated"):
        hub.fetch_weights("hf:a/gated@main")


def test_a_file_with_another_sum_is_refused_and_removed(server):
    server.add("a/b", {"model.safetensors": backbone()})
    server.wrong_sum.add("model.safetensors")
    for _ in range(2):
        with pytest.raises(InputError, match="is damaged: its sha256 is .*, the hub says"):
            hub.fetch_weights("hf:a/b")
    server.wrong_sum.clear()
    assert hub.fetch_weights("hf:a/b").path


def test_a_download_that_breaks_off_goes_on(server):
    data = backbone() + bytes(200_000)
    server.add("a/b", {"w.pth": data})
    server.cut, server.cuts = 150_000, 1
    assert Path(hub.fetch_weights("hf:a/b").path).read_bytes() == data
    assert server.cuts == 0


def test_no_network(monkeypatch, server):
    server.add("a/b", {"model.safetensors": backbone()})
    assert hub.fetch_weights("hf:a/b").path
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    assert hub.fetch_weights("hf:a/b").path, "by the cache"
    with pytest.raises(InputError, match="127.0.0.1:9 cannot be reached"):
        hub.fetch_weights("hf:a/c")


@contextlib.contextmanager
def web(files, length=None):
    """A plain web server of files by path; `length` is announced instead of their own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            data = files.get(self.path.split("?")[0])
            counted.append(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(length or len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

    counted: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield SimpleNamespace(url=url, requests=counted)
    finally:
        server.shutdown()
        server.server_close()


def test_weights_at_an_address(server, monkeypatch):
    data = backbone()
    digest = hashlib.sha256(data).hexdigest()
    good, bad = f"/r-{digest[:8]}.pth", "/r-00000000.pth"
    with web({good: data, bad: data, "/w.pth": data}) as place:
        for _ in range(2):
            weights = open_weights(f"{place.url}{good}?token=secret")
        assert len(place.requests) == 1, "an address is fetched once"
        assert weights.sha256 == digest and "secret" not in str(weights.origin)
        assert weights.settings["input.channel_order"] == "RGB"
        with pytest.raises(InputError, match=f"sha256 is {digest}, expected 00000000"):
            hub.fetch_weights(place.url + bad)
        assert hub.fetch_weights(f"{place.url}/w.pth#sha256={digest}").path
        for name, message in {
            f"{place.url}/no.pth": "answers 404",
            f"{place.url}/w.pth#sha256={'0' * 64}": "expected 0000",
            f"{place.url}/w.pth#page": "only sha256=HEX",
            "http://example.invalid/w.pth": "give https://",
            "https://127.0.0.1:9/w.pth": "cannot be fetched",
        }.items():
            with pytest.raises(InputError, match=f"init_from: .*{message}"):
                hub.fetch_weights(name)
        offline(monkeypatch)
        assert hub.fetch_weights(f"{place.url}/w.pth").path
        with pytest.raises(InputError, match="was not fetched before, and HF_HUB_OFFLINE"):
            hub.fetch_weights(f"{place.url}/new.pth")
    with web({"/w.pth": data}, length=len(data) + 10) as place:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        with pytest.raises(InputError, match=r"the connection ended after \d+ of"):
            hub.fetch_weights(f"{place.url}/w.pth")


@pytest.mark.parametrize(
    ("card", "want"),
    [
        (CARD.decode(), "apache-2.0"),
        ("---\r\nlicense: other\r\nlicense_name: mine\r\n---\r\n", "other (mine)"),
        ("no head", ""),
        ("---\n[1, 2]\n---\n", ""),
        ("---\nlicense: [a\n---\n", ""),
        ("---\nlicense: [a, b]\n---\n", ""),
        ("---\nlicense: !!python/object/apply:os.system ['x']\n---\n", ""),
    ],
)
def test_licence_of_a_card(card, want):
    from solov2_jax.weights.hub_client import licence_of_data

    assert licence_of_data(card_data(card)) == want
