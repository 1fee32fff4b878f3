"""Self-signed certificates, made by the `openssl` command for the length of a test."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest


def make_certificate(
    folder: Path, *names: str, subject: str = "test"
) -> tuple[Path, ssl.SSLContext]:
    """Return the file of a certificate for `names` (`DNS:localhost`), and a server's context.

    The certificate is its own authority: who is given the file trusts the server. Its key is in
    `key.pem` beside it. Without the command the test is skipped.
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
    """Return the file name under which OpenSSL looks for an authority in a folder."""
    command = ["openssl", "x509", "-subject_hash", "-noout", "-in", str(certificate)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, text=True)
    return f"{done.stdout.strip()}.0"
