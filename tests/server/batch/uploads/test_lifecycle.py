from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError, EnsembleError, StorageError
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.job_file import DamagedJobError
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.uploads.lifecycle import ROWS_GONE, _told


def test_a_damaged_job_file_is_told_from_one_that_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "jobs" / "batch_1.sqlite"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(DamagedJobError) as caught:
        JobStore.open(path, Identity())
    assert _told(caught.value) == ROWS_GONE


@pytest.mark.parametrize("kind", [DamagedJobError, ConfigError, StorageError])
def test_no_path_of_the_server_is_in_what_a_client_is_told(kind: type[EnsembleError]) -> None:
    assert "/srv/secret" not in _told(kind("/srv/secret/jobs/b.sqlite is damaged")).message
