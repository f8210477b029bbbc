// Package count turns the counters of a package into one table: a single struct contains the fields, their names and
// their meaning, and everything else (snapshots, sums, status, metrics) is derived from it.
//
// A table is a generic struct, so that the live counters and their snapshot cannot differ:
//
//	type Counters[T any] struct {
//		SYNs    T `metric:"tcp_syns_total" help:"Connections that programs asked for."`
//		Dropped T `metric:"dropped_packets_total" label:"reason=icmp" help:"Packets that were dropped." lost:"ICMP (ping)"`
//	}
//	var live Counters[atomic.Uint64] // live.SYNs.Add(1): one atomic operation, as without the table
//	var seen Counters[uint64]        // Add(&seen, &live)
//
// Two fields may share a name if their labels differ; "a=b,c=d" is two labels. A field of a snapshot that is of type int or int64
// is a current value, a gauge. A Histogram counts how long something took.
package count

import (
	"fmt"
	"reflect"
	"strings"
	"sync/atomic"
)

// Add adds each field of the table that src points to to the same field of the table that dst points to. Both must be
// of one generic struct, with plain or atomic numbers. Add panics if the structs differ, because that is a mistake in
// the program.
func Add(dst, src any) {
	add(reflect.ValueOf(dst).Elem(), reflect.ValueOf(src).Elem())
}

func add(dst, src reflect.Value) {
	if generic(dst.Type()) != generic(src.Type()) {
		panic(fmt.Sprintf("cannot add %v to %v: they are different tables", src.Type(), dst.Type()))
	}
	for i := range dst.NumField() {
		if to, from := dst.Field(i), src.Field(i); to.Kind() == reflect.Array {
			for j := range to.Len() {
				addCell(to.Index(j), from.Index(j))
			}
		} else {
			addCell(to, from)
		}
	}
}

func addCell(dst, src reflect.Value) {
	switch to := dst.Addr().Interface().(type) {
	case *uint64:
		*to += load(src)
	case *atomic.Uint64:
		to.Add(load(src))
	default:
		add(dst, src)
	}
}

// generic returns the name of a type without its type arguments.
func generic(t reflect.Type) string {
	name, _, _ := strings.Cut(t.Name(), "[")
	return t.PkgPath() + "." + name
}

func load(v reflect.Value) uint64 {
	if a, ok := v.Addr().Interface().(*atomic.Uint64); ok {
		return a.Load()
	}
	return v.Uint()
}

// Metric is a number with its description.
type Metric struct {
	Name  string // of the family, without the prefix of the program
	Label string // "key=value,key=value"; empty: none
	Help  string
	Lost  string // what was lost, as text; empty: nothing
	Gauge bool   // a current value; otherwise the number only grows
	Value float64
	Times *Histogram[uint64] // instead of Value; nil: it is one number
}

// Key returns the name with the labels. It is unique among all metrics.
func (m Metric) Key() string {
	if m.Label == "" {
		return m.Name
	}
	return m.Name + "{" + m.Label + "}"
}

// Each calls f for every number of a snapshot: a struct of plain numbers that may contain further structs. Fields
// without a name are skipped.
func Each(snapshot any, f func(Metric)) { each(reflect.ValueOf(snapshot), f) }

func each(v reflect.Value, f func(Metric)) {
	t := v.Type()
	for i := range v.NumField() {
		tag := t.Field(i).Tag
		m := Metric{Name: tag.Get("metric"), Label: tag.Get("label"), Help: tag.Get("help"), Lost: tag.Get("lost")}
		switch n := v.Field(i); {
		case m.Name != "" && n.Type() == reflect.TypeFor[Histogram[uint64]]():
			h := n.Interface().(Histogram[uint64])
			m.Times = &h
		case n.Kind() == reflect.Struct:
			each(n, f)
			continue
		case n.CanUint():
			m.Value = float64(n.Uint())
		case n.CanInt():
			m.Value, m.Gauge = float64(n.Int()), true
		}
		if m.Name != "" {
			f(m)
		}
	}
}
