# Read by the other recipes. Paths are the caller's; the scripts are in the project's folder, to which
# the recipes go.
absolute() { case $1 in /* | synthetic) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
case ${PYTHON:-} in */*) PYTHON=$(absolute "$PYTHON") ;; esac
