"""The subcommands of `nxdi-deepseek`: each module has add_arguments(parser) and run(args) -> exit status.

One that brings a parser of its own has run_with_own_parser(argv) -> exit status instead.
"""
