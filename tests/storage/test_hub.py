"""To the hub and back, with a folder in its place."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from untrained import decomposition, leaf, nested

import apd_jax
from apd_jax.errors import InputError

X = leaf(3, 16, 4)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub that keeps its repositories in a folder."""
    asked = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            if repo_id.startswith("nobody"):
                raise PermissionError("401 Unauthorized: who are you?\nmore")
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            asked.append((repo_id, private, self.token))

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo_id, revision, token, allow_patterns):
        asked.append((repo_id, revision, token))
        if not (tmp_path / repo_id).exists():
            raise FileNotFoundError(f"404: {repo_id} not found.")
        return str(tmp_path / repo_id)

    stand_in = SimpleNamespace(HfApi=Api, snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return SimpleNamespace(asked=asked, folder=tmp_path)


def test_there_and_back(hub):
    params, apply_fn = nested("dict")
    before = decomposition(params, apply_fn)
    evidence = SimpleNamespace(to_json=lambda: {"verdict": "Needed.", "checks": []})
    where = before.push_to_hub("me/mine", private=True, token="t", evidence=evidence)
    assert where.endswith("me/mine") and hub.asked == [("me/mine", True, "t")]
    card = (hub.folder / "me" / "mine" / "README.md").read_text()
    for word in ("# mine", 'from_pretrained("me/mine"', "Needed.", "| `num_components` | `5` |"):
        assert word in card
    after = apd_jax.from_pretrained("me/mine", apply_fn, revision="v1", token="t")
    assert hub.asked[-1] == ("me/mine", "v1", "t")
    np.testing.assert_array_equal(before.sparse_output(X), after.sparse_output(X))


def test_a_folder_comes_first_and_needs_no_extra(tmp_path, monkeypatch):
    params, apply_fn = nested("dict")
    decomposition(params, apply_fn).save(tmp_path / "me" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert apd_jax.from_pretrained("me/mine", apply_fn).components.num_components == 5
    with pytest.raises(InputError, match=r"pip install 'apd_jax\[hub\]'"):
        apd_jax.from_pretrained("me/other", apply_fn)
    with pytest.raises(InputError, match="does not exist"):
        apd_jax.from_pretrained(tmp_path / "nowhere", apply_fn)


def test_what_the_hub_refuses_is_one_sentence(hub):
    params, apply_fn = nested("dict")
    with pytest.raises(InputError, match=r"no folder me/nothing, and the hub gives .*404"):
        apd_jax.from_pretrained("me/nothing", apply_fn)
    with pytest.raises(InputError, match=r"nobody/x cannot be written on the hub \(401 [^\n]*$"):
        decomposition(params, apply_fn).push_to_hub("nobody/x")
