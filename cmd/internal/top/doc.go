// Package top is the live view of a viasocks in the terminal: its upstreams, its flows and their rates.
//
// The view asks the control socket once a second, as a user would do with status and flows; viasocks does nothing for it beyond
// that. rates.go turns what was answered into rates, view.go draws, model.go handles keys and sizes. Everything that comes from
// others (names, programs, errors) passes through control.Plain before it is drawn, so that the terminal obeys none of it.
package top
