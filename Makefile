# The project's commands; `make help` lists them. Anything longer than a few lines is a program of its own.
.DEFAULT_GOAL := help
