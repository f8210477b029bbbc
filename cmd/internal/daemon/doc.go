// Package daemon assembles the layers, starts and stops them in order, and tells the user what went wrong.
//
// Its files are named after what they belong to: run.go and run_*.go are the life cycle of `run`, up.go and up_*.go
// that of `up`, and plane.go and plane_*.go are the data plane that both of them start. The other files are shared by
// both life cycles, or are commands of their own: down.go, exec.go, and doctor.go for `doctor`. What keeps the process
// itself in order is in package process.
package daemon
