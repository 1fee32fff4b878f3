"""HTTP. Only this folder, `cli/` and `app.py` import Flask."""
