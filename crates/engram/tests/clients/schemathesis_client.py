"""Schemathesis against the document that a running server serves: python3 schemathesis_client.py URL MODEL"""

import subprocess
import sys

url = sys.argv[1]
# What a server must never do: fail, or answer what its document does not say.
checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", checks,
           "--max-examples", "60", "--request-timeout", "30", "--seed", "1"]
sys.exit(subprocess.run(command).returncode)
