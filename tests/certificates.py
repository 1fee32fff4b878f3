"""Temporary self-signed certificates, made by the `openssl` command."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest


def make_certificate(
    folder: Path, *names: str, subject: str = "test"
) -> tuple[Path, ssl.SSLContext]:
    """Return a certificate's file for `names` (such as `DNS:localhost`) and a server TLS context.

    The certificate is its own authority: a client that loads the file trusts the server. The key is
    in `key.pem` beside it. The test is skipped if the command is not installed.
    """
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={subject}"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", f"subjectAltName={','.join(names)}"]
    command += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def name_in_folder(certificate: Path) -> str:
    """Return the file name by which OpenSSL finds an authority in a folder."""
    command = ["openssl", "x509", "-subject_hash", "-noout", "-in", str(certificate)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, text=True)
    return f"{done.stdout.strip()}.0"
