"""YAML as files of jobs and prompts are read: YAML 1.2's numbers (010 is ten, 1e-3 a number, 1:30 none of base sixty).

A module of its own, so that help, JSON and everything but a file of YAML do without PyYAML.
"""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML whose numbers are what they look like, and whose keys come once."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # none of YAML 1.1's, but those below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key)  # 1 and 1.0 are one key
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


FORMS = {  # tag: what a plain word must look like, and how it may begin
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    "int": ("[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
for tag, (form, first) in FORMS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{form})$"), first)
Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # 010 is ten
