"""Say which browser the page tests will use; on a CI machine that lacks one, install Chromium with the system's package manager."""
import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def install() -> None:
    # Nothing is installed on a person's machine: only where CI says so, with rights to do it, and with apt.
    if os.environ.get("CI") != "true" or not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600).returncode:
            return


if __name__ == "__main__":
    if find() is None:
        install()
    print(f"browser for the page tests: {find() or 'none found; those tests are skipped'}")
