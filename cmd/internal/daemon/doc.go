// Package daemon assembles the layers, starts and stops them in order, and tells the user what went wrong.
package daemon
