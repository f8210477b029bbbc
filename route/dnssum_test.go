package route

import (
	"reflect"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
)

// TestDNSSum: counters go on after a reload, and what is kept now is what the last server keeps.
func TestDNSSum(t *testing.T) {
	var one dns.Stats
	v := reflect.ValueOf(&one).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.CanUint() {
			f.SetUint(1)
		} else {
			f.SetInt(1)
		}
	}
	var sum dnsSum
	sum.add(one)
	sum.add(one)
	v = reflect.ValueOf(sum)
	for i := range v.NumField() {
		if f := v.Field(i); f.CanUint() && f.Uint() != 2 || f.CanInt() && f.Int() != 1 {
			t.Errorf("%s is %v", v.Type().Field(i).Name, f)
		}
	}
}
