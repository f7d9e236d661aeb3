"""Certificates for tests: an authority, a server on 127.0.0.1, a client, and a stranger."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificates:
    """PEM files. `ca` has signed `server` and `client`; `stranger` has signed itself."""

    directory: Path

    def cert(self, name: str) -> str:
        return str(self.directory / f"{name}.pem")

    def key(self, name: str) -> str:
        return str(self.directory / f"{name}.key")

    def context(self, client: str = "") -> ssl.SSLContext:
        """A client's: trusts `ca`, shows the certificate of `client`."""
        context = ssl.create_default_context(cafile=self.cert("ca"))
        if client:
            context.load_cert_chain(self.cert(client), self.key(client))
        return context


def make_certificates(directory: Path) -> Certificates:
    """Skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("the machine has no openssl command")
    made = Certificates(directory)
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=20)

    for name in ("ca", "stranger"):
        run(
            "req", "-x509", *curve, "-days", "2", "-subj", f"/CN={name}",
            "-keyout", made.key(name), "-out", made.cert(name),
        )  # fmt: skip
    for name in ("server", "client"):
        request, extension = directory / f"{name}.csr", directory / f"{name}.ext"
        extension.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        run("req", *curve, "-subj", f"/CN={name}", "-keyout", made.key(name), "-out", str(request))
        run(
            "x509", "-req", "-in", str(request), "-CA", made.cert("ca"), "-CAkey", made.key("ca"),
            "-CAcreateserial", "-days", "2", "-extfile", str(extension), "-out", made.cert(name),
        )  # fmt: skip
    return made
