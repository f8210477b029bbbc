#!/bin/bash
#
# Question: can a service manager tell a crash of a Go program from wrong usage by its exit status?
#
# Why it matters: wrong usage has the exit status 2 by custom (also by the flag package of Go). A unit for systemd that is not
# restarted after wrong usage, by RestartPreventExitStatus=2, is then not restarted after a panic either, nor after a hang that
# WatchdogSec= ends with SIGABRT. With GOTRACEBACK=crash in its environment, the program ends by the signal in both cases.
#
# Seen with: Go 1.26. Explained by: the documentation of Go's packages runtime (GOTRACEBACK) and os/signal (a SIGABRT makes a
# program exit with a stack dump); fatalpanic and dieFromSignal in src/runtime.

. "$(dirname "$0")/lib.bash"

go_program <<'GO'
package main

import (
	"os"
	"syscall"
)

func main() {
	if os.Args[1] == "panic" {
		panic("a fault of the program")
	}
	syscall.Kill(os.Getpid(), syscall.SIGABRT)
	select {}
}
GO
ulimit -c 0
# status prints how a program ended: by an exit status, or above 128 by a signal.
status() { (cd "$work" && "$@") >/dev/null 2>&1 && echo 0 || echo $?; }
seen="$(status "$work/program" panic) $(status "$work/program" abort)"
crash="$(status env GOTRACEBACK=crash "$work/program" panic) $(status env GOTRACEBACK=crash "$work/program" abort)"
[[ $crash == "134 134" ]] || cannot "with GOTRACEBACK=crash it does not end by SIGABRT: $crash"

report version "$(go version | cut -d' ' -f3)"
report expected "after a panic and after SIGABRT a program ends otherwise than after wrong usage"
report seen "exit statuses $seen, as after wrong usage; with GOTRACEBACK=crash it ends by SIGABRT ($crash)"
conclude "$seen" "2 2"
