"""The YAML of configurations: YAML 1.1 as PyYAML reads it safely, less three surprises.

``1e-4`` is a number, a date stays text, and a key that is given twice is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_DATE = "tag:yaml.org,2002:timestamp"
# Either a point or an exponent makes a float; PyYAML's own pattern wants both a point and a signed exponent.
_FLOAT_PATTERN = re.compile(
    r"""^(?:[-+]?(?:\d[\d_]*)?\.[\d_]+(?:[eE][-+]?\d+)?
    |[-+]?\d[\d_]*\.(?:[eE][-+]?\d+)?
    |[-+]?\d[\d_]*[eE][-+]?\d+
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (_FLOAT, _DATE)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


# One table for both, so that the dumper quotes text which the loader would take for a number.
for _cls in (_Loader, _Dumper):
    _cls.yaml_implicit_resolvers = dict(_RESOLVERS)
    _cls.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value that ``text`` stands for; raises yaml.YAMLError."""
    loader = _Loader(text)
    node = loader.get_single_node()
    # Deep, so that an alias within its own anchor is an error here and no endless structure later.
    return None if node is None else loader.construct_object(node, deep=True)


def dump_yaml(value: Any) -> str:
    """``value`` as text that ``parse_yaml`` turns back into it, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False)
