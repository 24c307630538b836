"""What MLflow has of the runs in a folder: asked by a fresh interpreter with nothing configured, as `mlflow ui` is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_SCRIPT = """
import json, os, sys
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
from mlflow.tracking import MlflowClient
client = MlflowClient()
found = []
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        found.append({
            "experiment": experiment.name, "experiment_id": experiment.experiment_id,
            "name": run.info.run_name, "status": run.info.status,
            "tags": run.data.tags, "params": run.data.params, "metrics": run.data.metrics,
            "series": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, sys.argv[1])],
            "datasets": [(d.dataset.name, [t.value for t in d.tags]) for d in run.inputs.dataset_inputs],
            "files": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
            "artifacts": run.info.artifact_uri,
        })
print(json.dumps(found))
"""


def read_back(folder: Path, series: str = "none") -> list[dict[str, Any]]:
    """Return a dictionary a run of the store in *folder*; in it `series` holds [step, value] of the metric *series*."""
    answer = subprocess.run(
        [sys.executable, "-c", _SCRIPT, series], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    found: list[dict[str, Any]] = json.loads(answer)
    return found
