"""Patterns of tokens, keys and passwords, which neither a setting nor a pushed file may hold."""

SECRETS = {
    "a Hugging Face token": r"hf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"sk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"AKIA[0-9A-Z]{16}",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{36}",
    "a Google key": r"AIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"xox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a URL with a password": r"://[^\s/?#@:\"']*:[^\s/?#@\"']+@",
    # Parameters of the stores' presigned URLs, and those in which services pass a token; `%26` and `%3D` in a URL's URL.
    "a signed URL, or one with a token": (
        r"(?i)(?:[?&;]|%3f|%26)"
        r"(?:x-(?:amz|goog)-(?:signature|security-token)|signature|sig|(?:access_|auth_)?token|api_?key|password|secret)"
        r"(?:=|%3d)[^\s&\"'<>]{8,}"
    ),
}
