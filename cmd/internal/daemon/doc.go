// Package daemon puts the layers together, starts and stops them in order, and tells the user what went wrong.
package daemon
