"""``flexkern schema``: the JSON Schema of job files."""

import json
from dataclasses import dataclass

from flexkern.cli.errors import refusing


@dataclass(kw_only=True)
class Schema:
    """Print the JSON Schema of job files, for editors and for programs that write them."""

    def run(self) -> int:
        with refusing(ValueError):
            from flexkern.render.schema import job_schema
        print(json.dumps(job_schema(), indent=2))
        return 0
