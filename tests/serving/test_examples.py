"""The configurations we show are ones that Serve and we ourselves take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import Config, ConfigError
from cluster.serving import app, deployment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def serve_configs() -> list[Any]:
    kuberay = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    return [
        yaml.safe_load((EXAMPLES / "serve_config.yaml").read_text()),
        yaml.safe_load(kuberay["spec"]["serveConfigV2"]),
    ]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What configurations an application was to be built of."""
    configs: list[Config] = []
    monkeypatch.setattr(deployment, "build", configs.append)
    return configs


@pytest.mark.parametrize("config", serve_configs(), ids=["serve_config.yaml", "kuberay.yaml"])
def test_an_example_is_taken(config: Any, built: list[Config]) -> None:
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "cluster.serving:app"
    app(application["args"])
    assert built[0].model.path == "/models/mine"
    assert built[0].serving.max_replicas > built[0].cluster.num_replicas


def test_arguments_may_be_sections_or_fields(built: list[Config]) -> None:
    app({"model.path": "/m", "model": {"kv_tokens": 4096}, "store.ssd_bytes": "1GiB"})
    assert (built[0].model.path, built[0].model.kv_tokens, built[0].store.ssd_bytes) == ("/m", 4096, 1 << 30)
    with pytest.raises(ConfigError, match=r"model\.nonsense is not a field"):
        app({"model.nonsense": 1})
