// Package top is the live view of a viasocks in the terminal: its upstreams, its flows and their rates.
//
// The view asks the control socket once a second for status and flows; viasocks does no other work for it. rates.go
// computes rates from the answers, view.go draws, and model.go handles keys and sizes. All text from outside (names,
// programs, errors) passes through control.Plain before it is drawn, so that it cannot control the terminal.
package top
