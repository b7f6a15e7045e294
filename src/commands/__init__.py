"""The subcommands of `nxdi-deepseek`: each module has add_arguments(parser) and run(args) -> exit status."""
