import subprocess
import sys
from pathlib import Path

import pytest

from cluster import bringup
from cluster.config import Config, ConfigError, config_from, config_to_yaml, load_config


def test_defaults_survive_a_round_trip_through_yaml(tmp_path: Path) -> None:
    file = tmp_path / "reprise.yaml"
    file.write_text(config_to_yaml(Config()))
    assert load_config(str(file)) == Config()


def test_sizes_are_written_as_people_write_them() -> None:
    config = load_config(None, ["store.dram_bytes=2GiB", "store.ssd_bytes=500MB", "store.object_bytes=7"])
    assert (config.store.dram_bytes, config.store.ssd_bytes, config.store.object_bytes) == (2 * 1024**3, 500_000_000, 7)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "reprise.yaml"
    file.write_text("cluster:\n  num_replicas: 2\nscheduler:\n  prefetch: policies.prefetch:Off\n")
    config = load_config(str(file), ["cluster.num_replicas=3"])
    assert config.cluster.num_replicas == 3
    assert config.scheduler.prefetch == "policies.prefetch:Off"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("store.dram=1", "store.dram is not a field"),
        ("scheduler.lease=1", "scheduler.lease is not a field"),
        ("shop.x=1", "shop is not a field"),
        ("store.dram_bytes=lots", "store.dram_bytes"),
        ("store.dram_bytes=-1", "store.dram_bytes"),
        ("cluster.num_replicas=0", "cluster.num_replicas"),
        ("scheduler.lease_s=soon", "scheduler.lease_s"),
        ("model.chunk_tokens=17", "multiple of model.block_tokens"),
        ("cluster.record=s3://bucket/log", "cluster.record is s3://bucket/log: name a file of the scheduler's node"),
        ("cluster.record_max_bytes=0", "cluster.record_max_bytes"),
        ("scheduler.policy_limit_s=0", "policy_limit_s is 0"),
        ("nonsense", "section.field=value"),
    ],
)
def test_bad_values_are_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, [override])


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: 3\n", "model: [", "\x00"])
def test_bad_files_are_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(file))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_strict_policies_are_for_the_laboratory() -> None:
    config = load_config(None, ["model.path=somewhere", "scheduler.strict_policies=true"])
    with pytest.raises(ConfigError, match="strict_policies is for `reprise lab`"), bringup.running(config):
        pass


def test_a_policy_that_cannot_be_made_is_told_before_anything_starts() -> None:
    config = load_config(None, ["model.path=somewhere", "scheduler.eviction=policies.eviction:Lru(size=3)"])
    with (
        pytest.raises(ConfigError, match=r"scheduler: eviction policy .*'size'.*accepts no options"),
        bringup.running(config),
    ):
        pass


def test_empty_sections_are_defaults() -> None:
    assert config_from({"model": None, "store": {}}) == Config()


def test_a_folder_that_hides_a_room_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "__init__.py").touch()
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); sys.path.insert(0, {str(tmp_path)!r}); import cluster"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert f"{tmp_path / 'policies'} hides Reprise's package 'policies'" in last
    assert "Rename your folder" in last
