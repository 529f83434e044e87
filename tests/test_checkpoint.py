"""Checkpoints: whole, safe to load, and clear about what is wrong with a file."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from heteroakd.system.files import atomic_file, older, remove_leftovers, write_text
from heteroakd.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_same_run,
    load_checkpoint,
    load_latest,
    load_state,
    random_states,
    restore_random_states,
    save_checkpoint,
    seed_generators,
    state_digest,
)
from torch import nn


def checkpoint() -> Checkpoint:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return Checkpoint(
        kind="student",
        step=7,
        config={"schedule": {"steps": 9}, "data": {"crop_size": [32, 32], "root": None}},
        model={"architecture": "segformer"},
        classes=["road", "sky"],
        network=network.state_dict(),
        loss={},
        optimizer=optimizer.state_dict(),
        random_states=[random_states()],
        metrics={"miou": 0.5, "best_miou": float("-inf")},
    )


def test_everything_comes_back_with_weights_only(tmp_path: Path) -> None:
    saved = checkpoint()
    save_checkpoint(tmp_path / "new" / "last.pt", saved)
    loaded = load_checkpoint(tmp_path / "new" / "last.pt")
    assert (loaded.kind, loaded.step, loaded.config, loaded.classes) == ("student", 7, saved.config, saved.classes)
    assert loaded.metrics == saved.metrics
    assert all(torch.equal(value, saved.network[name]) for name, value in loaded.network.items())
    assert torch.equal(loaded.random_states[0]["cpu"], saved.random_states[0]["cpu"])
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]
    assert os.listdir(tmp_path / "new") == ["last.pt"]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk on fire"), atomic_file(path) as file:
        file.write(b"half of the n")
        raise RuntimeError("disk on fire")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_written_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "atomic", "")
    (tmp_path / "plain").touch()
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def save_steps(path: Path, steps: range, keep: int) -> None:
    for step in steps:
        saved = checkpoint()
        saved.step = step
        save_checkpoint(path, saved, keep=keep)


def test_older_checkpoints_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_steps(path, range(1, 6), keep=3)
    assert sorted(os.listdir(tmp_path)) == ["last.1.pt", "last.2.pt", "last.pt"]
    assert [load_checkpoint(older(path, age)).step for age in range(3)] == [5, 4, 3]
    save_steps(path, range(6, 7), keep=1)
    assert [load_checkpoint(older(path, age)).step for age in range(3)] == [6, 4, 3]


def test_damaged_or_missing_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_steps(path, range(1, 4), keep=3)
    said: list[str] = []
    assert load_latest(path, said.append)[0] == path and not said
    path.write_bytes(path.read_bytes()[:1000])
    used, found = load_latest(path, said.append)
    assert used == older(path, 1) and found.step == 2
    assert len(said) == 1 and "last.pt: truncated or not a checkpoint" in said[0]
    torch.save({"foreign": 1}, older(path, 1))
    assert load_latest(path, said.append)[1].step == 1
    assert "last.1.pt: a file of torch, but not a checkpoint that heteroakd wrote" in said[-1]
    path.unlink()
    older(path, 1).unlink()  # a gap, as a kill between two renames may leave
    assert load_latest(path, said.append)[1].step == 1 and "last.pt: no such checkpoint" in said[-1]
    older(path, 2).write_bytes(b"")
    (tmp_path / "last.x.pt").write_bytes(b"")  # somebody else's
    with pytest.raises(CheckpointError, match="last.pt: no such checkpoint"):
        load_latest(path, said.append)
    with pytest.raises(CheckpointError, match="nowhere/last.pt: no such checkpoint"):
        load_latest(tmp_path / "nowhere" / "last.pt", said.append)


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", checkpoint())
    (tmp_path / ".heteroakd-abc123.tmp").write_bytes(b"half")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / ".heteroakd-abc123.tmp").write_bytes(b"half")
    with atomic_file(tmp_path / "b.png"):  # which another process writes: flock knows files by their opening
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    assert sorted(os.listdir(tmp_path)) == ["b.png", "last.pt", "pictures"] and not any(
        (tmp_path / "pictures").iterdir()
    )
    remove_leftovers(tmp_path / "nowhere")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("kept", [0, 10, 400, -20])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"last\.pt: truncated or not a checkpoint"):
        load_checkpoint(path)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


def test_foreign_files_are_named_and_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    foreign = {
        "text.pt": b"not a checkpoint",
        "pickle.pt": pickle.dumps(Malicious()),
    }
    for name, contents in foreign.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(CheckpointError, match=f"{name}: truncated or not a checkpoint"):
            load_checkpoint(tmp_path / name)
    torch.save({"evil": Malicious()}, tmp_path / "zip.pt")
    with pytest.raises(CheckpointError, match=r"zip\.pt: truncated or not a checkpoint"):
        load_checkpoint(tmp_path / "zip.pt")
    assert not (tmp_path / "executed").exists()


def test_other_torch_files_and_versions_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match="not a checkpoint that heteroakd wrote"):
        load_checkpoint(path)
    torch.save({"format": "heteroakd checkpoint", "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99, expected 2"):
        load_checkpoint(path)
    torch.save({"format": "heteroakd checkpoint", "version": 2, "step": 3}, path)
    with pytest.raises(CheckpointError, match="lacks kind, config"):
        load_checkpoint(path)


def test_state_of_another_network_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"last\.pt: does not fit the configured network"):
        load_state(nn.Linear(3, 2).load_state_dict, nn.Linear(4, 2).state_dict(), "last.pt")


def test_resuming_with_other_options_names_them() -> None:
    saved = {"schedule": {"steps": 9, "seed": 0}, "runtime": {"workers": 0}}
    check_same_run(Path("last.pt"), saved, {**saved, "runtime": {"workers": 4}}, may_differ={"runtime"})
    message = r"other options: schedule\.seed \(0 there, 1 now\)\. Its own are in config\.yaml"
    with pytest.raises(CheckpointError, match=message):
        check_same_run(Path("last.pt"), saved, {**saved, "schedule": {"steps": 9, "seed": 1}}, may_differ={"runtime"})


def draw() -> tuple[float, ...]:
    return random.random(), random.gauss(), float(np.random.normal()), float(torch.rand(()))


def test_random_states_continue_the_stream_of_every_generator(tmp_path: Path) -> None:
    seed_generators(2**40)
    first = draw()
    saved = checkpoint()
    expected = draw(), draw()
    save_checkpoint(tmp_path / "last.pt", saved)
    restore_random_states(load_checkpoint(tmp_path / "last.pt").random_states[0])
    assert (draw(), draw()) == expected
    seed_generators(2**40)
    assert draw() == first


def test_digests_tell_trained_networks_apart() -> None:
    states = [checkpoint().network for _ in range(2)]
    states += [{name: value.clone() for name, value in reversed(states[0].items())}]
    digests = [state_digest(state) for state in states]
    assert digests[0] == digests[2] != digests[1]
    states[2]["weight"].view(-1)[-1] += 1
    assert state_digest(states[2]) != digests[0]
    extra = [state_digest({**states[0], "extra": {"a": value}}) for value in (1, 2)]  # from Module.get_extra_state
    assert len({*extra, digests[0]}) == 3


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    saved = checkpoint()
    for name in ("last.pt", "last.1.pt"):
        save_checkpoint(tmp_path / name, saved)
    contents = bytearray((tmp_path / "last.pt").read_bytes())
    contents[contents.index(saved.network["weight"].numpy().tobytes()) + 3] ^= 1
    (tmp_path / "last.pt").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"last\.pt: damaged, its record '.*data/\d+' is not what was written"):
        load_checkpoint(tmp_path / "last.pt")
    said: list[str] = []
    assert load_latest(tmp_path / "last.pt", said.append)[0].name == "last.1.pt" and len(said) == 1
