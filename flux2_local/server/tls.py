"""A certificate authority for this machine alone, so that clients that insist on https can be pointed here.

The authority signs one certificate and its key is thrown away: nobody, not even this server, can sign another one with
it, so trusting it is trusting this server and nothing else.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = datetime.timedelta(days=730)
RENEW = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Certificates:
    """Files in PEM form: our authority, the server's certificate and key, and certifi's authorities with ours added."""

    authority: Path
    certificate: Path
    key: Path
    bundle: Path


def make_certificates(folder: Path, host: str) -> Certificates:
    """The certificates in ``folder``, made where there are none, they do not name ``host``, or they end soon."""
    import certifi

    folder.mkdir(parents=True, exist_ok=True)
    found = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key", folder / "bundle.pem")
    names = host_names(host)
    if not _usable(found, names):
        authority, leaf, key = sign(names)
        found.key.touch(mode=0o600)
        found.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        found.certificate.write_bytes(leaf.public_bytes(Encoding.PEM))
        found.authority.write_bytes(authority.public_bytes(Encoding.PEM))
    found.bundle.write_bytes(Path(certifi.where()).read_bytes() + b"\n" + found.authority.read_bytes())
    return found


def host_names(host: str) -> list[str]:
    """The names that the server is called by."""
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname()]
    if host not in (*names, "", "0.0.0.0", "::"):
        names.append(host)
    return names


def sign(names: list[str]) -> tuple[x509.Certificate, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A new authority, a certificate of it for ``names``, and that certificate's key."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flux2-local, this machine's own authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flux2-local")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    authority = (
        _builder(issuer, issuer, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    leaf = (
        _builder(subject, issuer, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return authority, leaf, key


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + VALID)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usable(found: Certificates, names: list[str]) -> bool:
    if not all(p.exists() for p in (found.authority, found.certificate, found.key)):
        return False
    leaf = x509.load_pem_x509_certificate(found.certificate.read_bytes())
    named = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    soon = datetime.datetime.now(datetime.UTC) + RENEW
    return leaf.not_valid_after_utc > soon and all(_general(name) in list(named) for name in names)
