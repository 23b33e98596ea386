/** That `index.d.ts` declares what the source has, no more and no less. */

import type * as declared from '../../vlm_export/js/index.d.ts';
import type * as source from '../../vlm_export/js/src/model.js';

type Model = declared.VisionLanguageModel;
type Source = source.VisionLanguageModel;
/** Without what is private. */
type Public<Type> = { [Name in keyof Type]: Type[Name] };
type Same<One, Other> = [One, Other] extends [Other, One] ? true : false;

/** Where the first is what the other asks for. */
function fits<_Source extends Wanted, Wanted>(): void {}
function holds<_Fact extends true>(): void {}

fits<Public<Source>, Public<Model>>();
holds<Same<keyof Source, keyof Model>>();
holds<Same<keyof typeof source, keyof typeof declared>>();
holds<Same<keyof typeof source.VisionLanguageModel, keyof typeof declared.VisionLanguageModel>>();

type Loading = typeof source.VisionLanguageModel.from_pretrained;
holds<Same<Parameters<Loading>, Parameters<typeof declared.VisionLanguageModel.from_pretrained>>>();

/** `any` would fit everything. */
type IsAny<Type> = 0 extends 1 & Type ? true : false;
type Anys<Type> = { [Name in keyof Type]: IsAny<Type[Name]> extends true ? Name : never }[keyof Type];
holds<Same<Anys<Source>, never>>();
