package informer

import (
	"bytes"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Resource is what an informer can keep.
type Resource interface {
	comparable
	proto.Message
	GetName() string
	GetUid() string
	GetLabels() map[string]string
}

// IndexFunc returns the values under which a resource is found in an index.
type IndexFunc[T Resource] func(resource T) []string

// entry is one resource: in few bytes as it was sent, or decoded.
type entry[T Resource] struct {
	uid     string
	name    string
	packed  []byte
	decoded T
	places  []*bucket[T]
}

// bucket is what is found under one value of one index. Most values are those of one resource alone.
type bucket[T Resource] struct {
	index int
	value string
	one   *entry[T]
	more  map[*entry[T]]struct{}
}

func (b *bucket[T]) add(e *entry[T]) {
	switch {
	case b.one == nil && b.more == nil:
		b.one = e
	case b.more == nil:
		b.more = map[*entry[T]]struct{}{b.one: {}, e: {}}
		b.one = nil
	default:
		b.more[e] = struct{}{}
	}
}

// remove reports whether nothing is left.
func (b *bucket[T]) remove(e *entry[T]) bool {
	if b.more == nil {
		b.one = nil
		return true
	}
	delete(b.more, e)
	return len(b.more) == 0
}

type store[T Resource] struct {
	keepsDecoded bool
	byUID        map[string]*entry[T]
	byName       map[string]*entry[T]
	indexes      []index[T]
}

type index[T Resource] struct {
	name    string
	values  IndexFunc[T]
	buckets map[string]*bucket[T]
}

func newStore[T Resource](keepsDecoded bool) *store[T] {
	return &store[T]{keepsDecoded: keepsDecoded, byUID: map[string]*entry[T]{}, byName: map[string]*entry[T]{}}
}

func (s *store[T]) addIndex(name string, values IndexFunc[T]) {
	for _, known := range s.indexes {
		if known.name == name {
			panic("informer: there is an index " + name + " already")
		}
	}
	s.indexes = append(s.indexes, index[T]{name, values, map[string]*bucket[T]{}})
}

func (s *store[T]) pack(resource T) []byte {
	if s.keepsDecoded {
		return nil
	}
	packed, err := proto.MarshalOptions{Deterministic: true}.Marshal(resource)
	if err != nil {
		panic(err) // it has just been unmarshalled
	}
	return packed
}

func (s *store[T]) same(known *entry[T], resource T, packed []byte) bool {
	if s.keepsDecoded {
		return proto.Equal(known.decoded, resource)
	}
	return bytes.Equal(known.packed, packed)
}

// put takes a resource into a new entry or into the one that it has.
func (s *store[T]) put(e *entry[T], resource T, packed []byte) {
	delete(s.byName, e.name)
	e.uid, e.name = resource.GetUid(), resource.GetName()
	if s.keepsDecoded {
		e.decoded = resource
	} else {
		e.packed = packed
	}
	s.byUID[e.uid] = e
	s.byName[e.name] = e
	s.place(e, resource)
}

// place puts an entry where the values of its resource say; where nothing has changed, nothing is touched.
func (s *store[T]) place(e *entry[T], resource T) {
	places := make([]*bucket[T], 0, max(len(e.places), 8))
	for number := range s.indexes {
		for _, value := range s.indexes[number].values(resource) {
			found := s.indexes[number].buckets[value]
			if found == nil {
				found = &bucket[T]{index: number, value: strings.Clone(value)}
				s.indexes[number].buckets[found.value] = found
			}
			if !slices.Contains(places, found) {
				places = append(places, found)
			}
		}
	}
	for _, place := range e.places {
		if !slices.Contains(places, place) && place.remove(e) {
			delete(s.indexes[place.index].buckets, place.value)
		}
	}
	for _, place := range places {
		if !slices.Contains(e.places, place) {
			place.add(e)
		}
	}
	if !slices.Equal(e.places, places) {
		e.places = slices.Clip(slices.Clone(places))
	}
}

func (s *store[T]) remove(e *entry[T]) {
	for _, place := range e.places {
		if place.remove(e) {
			delete(s.indexes[place.index].buckets, place.value)
		}
	}
	delete(s.byUID, e.uid)
	delete(s.byName, e.name)
}

func (s *store[T]) bucket(name, value string) *bucket[T] {
	for number := range s.indexes {
		if s.indexes[number].name == name {
			return s.indexes[number].buckets[value]
		}
	}
	panic("informer: there is no index " + name)
}

func (s *store[T]) count(name, value string) int {
	switch found := s.bucket(name, value); {
	case found == nil:
		return 0
	case found.more == nil:
		return 1
	default:
		return len(found.more)
	}
}

// find returns the entries under a value, by name.
func (s *store[T]) find(name, value string) []*entry[T] {
	found := s.bucket(name, value)
	switch {
	case found == nil:
		return nil
	case found.more == nil:
		return []*entry[T]{found.one}
	}
	entries := make([]*entry[T], 0, len(found.more))
	for e := range found.more {
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b *entry[T]) int { return strings.Compare(a.name, b.name) })
	return entries
}

func (s *store[T]) get(e *entry[T]) (T, bool) {
	if e == nil {
		return *new(T), false
	}
	return s.decode(e), true
}

func (s *store[T]) decode(e *entry[T]) T {
	if s.keepsDecoded {
		return e.decoded
	}
	var none T
	resource := none.ProtoReflect().Type().New().Interface().(T)
	if err := proto.Unmarshal(e.packed, resource); err != nil {
		panic(err) // this process has written it
	}
	return resource
}

func (s *store[T]) decodeAll(entries []*entry[T]) []T {
	resources := make([]T, len(entries))
	for number, e := range entries {
		resources[number] = s.decode(e)
	}
	return resources
}

// renamed returns a copy of a resource with another name.
func renamed[T Resource](resource T, name string) T {
	copied := proto.CloneOf(resource)
	reflected := copied.ProtoReflect()
	reflected.Set(reflected.Descriptor().Fields().ByName("name"), protoreflect.ValueOfString(name))
	return copied
}
