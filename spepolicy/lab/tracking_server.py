"""Start a tracking server for several machines: MLflow on PostgreSQL.

    python -m spepolicy.lab.tracking_server FOLDER --port 5000

The database and the artifacts are kept in FOLDER; started again, it goes on with them. The line `tracking.uri=...`
that it prints is what sweeps are given. Ctrl-C stops it. It needs PostgreSQL's programs (Debian: package postgresql)
and the driver (pip install 'spepolicy[postgresql]'). PostgreSQL itself listens on a socket in a private folder only.
The server listens on this machine alone unless --host says otherwise; it asks nobody for a password, so what is beyond
a trusted network belongs behind a proxy that does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from spepolicy.errors import ConfigurationError, OutputError, SpePolicyError

__all__ = ["main"]

DATABASE = "mlflow"
OWNER = "spepolicy"  # the database's own superuser; it is no user of this machine
READY_S = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is stopped; return 0, or 2 with a message if it cannot be started."""
    parser = argparse.ArgumentParser(prog="spepolicy.lab.tracking_server", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the database and the artifacts are kept")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=5000, help="port of the server (default 5000)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        with _database(options.folder.absolute()) as uri, _server(uri, options) as server:
            shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
            print(f"tracking.uri=http://{shown}:{options.port}", flush=True)
            server.wait()
            raise OutputError(f"MLflow's server ended with status {server.returncode}; see '{_log(options.folder)}'.")
    except KeyboardInterrupt:
        return 0
    except SpePolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _log(folder: Path) -> Path:
    return folder / "server.log"


# ---- PostgreSQL ------------------------------------------------------------------------------------------------------


def _programs() -> Path:
    """Return the folder of PostgreSQL's programs; Debian keeps those of a server out of the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not installed:
        raise ConfigurationError(
            "PostgreSQL's programs (initdb, pg_ctl) are not installed. Install them, on Debian with "
            "apt install postgresql."
        )
    return installed[-1].parent


@contextmanager
def _database(folder: Path) -> Iterator[str]:
    """Start PostgreSQL on the cluster in *folder*, made if it is not there; yield its URI for MLflow."""
    if find_spec("psycopg2") is None:
        raise ConfigurationError(
            "the PostgreSQL driver psycopg2 is not installed. Install it with pip install 'spepolicy[postgresql]'."
        )
    programs = _programs()
    # PostgreSQL refuses to run as root, so root runs it as the user that the package has made.
    user = "postgres" if os.geteuid() == 0 else None
    data = folder / "database"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "artifacts").mkdir(exist_ok=True)
        data.mkdir(mode=0o700, exist_ok=True)
        if user:
            shutil.chown(data, user)
    except (OSError, LookupError) as error:
        raise OutputError(
            f"the tracking server's folder '{folder}' cannot be used: {error}. Choose another."
        ) from error
    socket = tempfile.mkdtemp(prefix="spepolicy-pg-")  # a path of at most 107 characters, which *folder* may not be
    if user:
        shutil.chown(socket, user)

    def run(name: str, *arguments: str) -> None:
        command = [str(programs / name), *arguments]
        # Not with pipes: the server that pg_ctl leaves behind would keep them open.
        with tempfile.TemporaryFile("w+") as said:
            ended = subprocess.run(command, stdout=said, stderr=said, user=user, cwd="/", check=False)
            said.seek(0)
            if ended.returncode:
                raise OutputError(f"{name} failed for '{data}': {' '.join(said.read().split())[-400:]}")

    try:
        new = not (data / "PG_VERSION").exists()
        if new:
            # Only this process's user can reach the socket, so that is the password.
            run("initdb", "-D", str(data), "-U", OWNER, "--auth=trust", "--encoding=UTF8", "--locale=C")
        log = data / "postgresql.log"
        run("pg_ctl", "-D", str(data), "-l", str(log), "-w", "-o", f"-c listen_addresses='' -k {socket}", "start")
        try:
            if new:
                run("createdb", "-h", socket, "-U", OWNER, DATABASE)
            # SQLAlchemy 2.1 takes a plain postgresql:// for psycopg 3.
            yield f"postgresql+psycopg2://{OWNER}@/{DATABASE}?host={quote(socket)}"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "fast", "-w", "stop")
    finally:
        shutil.rmtree(socket, ignore_errors=True)


# ---- MLflow ----------------------------------------------------------------------------------------------------------


@contextmanager
def _server(uri: str, options: argparse.Namespace) -> Iterator[subprocess.Popen[bytes]]:
    """Start MLflow's server on the database, and wait until it answers."""
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # Two processes instead of ten: the jobs are of no use here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--artifacts-destination",
        str(options.folder.absolute() / "artifacts"), "--serve-artifacts", "--host", options.host, "--port",
        str(options.port), "--workers", "1",
    ]  # fmt: skip
    with _log(options.folder).open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True)
        try:
            _wait_for(f"http://{options.host}:{options.port}/health", server, _log(options.folder))
            yield server
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)  # its own group: the server and its worker
                try:
                    server.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)
                    server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise OutputError(f"MLflow's server does not answer at {address}; see '{log}'. Is the port taken? Choose --port.")


if __name__ == "__main__":
    sys.exit(main())
