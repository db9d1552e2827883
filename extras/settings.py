"""Settings on the command line and in a JSON file: every field of a dataclass is an option, and a name in the file."""

import argparse
from dataclasses import fields

import variants
from gemma import InputError, read_json


def options(parser, config_class):
    """One command-line option for each field of a dataclass of settings."""
    for f in fields(config_class):
        name, text = "--" + f.name.replace("_", "-"), f.metadata.get("help", f"see {config_class.__name__}")
        if isinstance(f.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(name, type=type(f.default), default=f.default, help=f"{text} (default: {f.default if f.default != '' else 'automatic'})")


def from_file(path, *config_classes):
    """The settings in a JSON file, a dict. Raises InputError for a name that no class has, or a value of the wrong type."""
    known = {f.name: type(f.default) for c in config_classes for f in fields(c)}
    values = read_json(path)
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{path}: expected names of settings of this variant, got {name!r}; python train.py --variant … --help lists them.")
        if not (type(value) is known[name] or (known[name] is float and type(value) is int)):
            raise InputError(f"{path}: expected {name} to be {known[name].__name__}, got {value!r}.")
        try:
            values[name] = known[name](value)
        except OverflowError:
            raise InputError(f"{path}: expected {name} to be an ordinary number, got one of {len(str(value))} digits.") from None
    return values


def read_settings(arguments, train_class, description, example):
    """(settings, the variant's config): from --config if there is one, with what the command line says over it.

    Raises InputError for what can't be trained with.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--variant")
    first.add_argument("--config")
    said, _ = first.parse_known_args(arguments)
    in_file = read_json(said.config) if said.config else {}
    variant = said.variant or in_file.get("variant", "graph")
    config_class = variants.find(variant).Config
    parser = argparse.ArgumentParser(description=description, epilog=f"example: {example}", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="a JSON file of settings; what the command line says counts more")
    options(parser.add_argument_group("training"), train_class)
    options(parser.add_argument_group(f"memory ({variant}; another --variant has others)"), config_class)
    if said.config:
        parser.set_defaults(**from_file(said.config, train_class, config_class))
    values = vars(parser.parse_args(arguments))
    settings = train_class(**{f.name: values[f.name] for f in fields(train_class)})
    settings.check()
    values["chat"] = values["chat"] or settings.model.rstrip("/").endswith("-it")         # instruction-tuned bases are asked in turns
    return settings, config_class.from_dict({f.name: values[f.name] for f in fields(config_class)}, "command line")
