"""A study that workers share through a real PostgreSQL server, started here on loopback."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from test_study import three_workers_of_which_one_is_killed


def _programs():
    found = [shutil.which("initdb"), shutil.which("postgres")]
    if all(found):
        return found
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return [str(homes[-1] / name) for name in ("initdb", "postgres")] if homes else None


def _user():
    """PostgreSQL does not run as root."""
    if os.getuid() != 0:
        return {}
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@pytest.fixture
def server():
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    initdb, postgres = programs
    user = _user()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = Path(tempfile.mkdtemp())
    if user:
        os.chown(home, user["user"], user["group"])
    data = home / "data"
    options = {"cwd": home, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    subprocess.run(
        [initdb, "-D", data, "-A", "trust", "-U", "lean", "--no-sync"], check=True, **options
    )
    listen = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={home}"]
    process = subprocess.Popen([postgres, "-D", data, "-p", str(port), "-F", *listen], **options)
    try:
        _wait(port, process)
        yield f"postgresql://lean@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown, whoever is connected
        process.wait(30)
        shutil.rmtree(home, ignore_errors=True)


def _wait(port, process):
    import psycopg

    for _ in range(300):
        assert process.poll() is None
        try:
            psycopg.connect(
                f"host=127.0.0.1 port={port} user=lean dbname=postgres connect_timeout=1"
            ).close()
        except psycopg.OperationalError:
            pass
        else:
            return
        time.sleep(0.1)
    raise AssertionError("PostgreSQL does not answer")


def test_three_workers_share_a_server_and_one_is_killed(server, tmp_path):
    three_workers_of_which_one_is_killed(tmp_path, server)
